"""Images and videos: from paths, bytes, arrays and URLs to the patches that the vision tower takes."""
