"""What the tests of the tuner run in place of its worker: no kernels, but every way to fail, told by the fields.

At ``rows`` of 128 a candidate takes ``step`` microseconds, at 64 it fails by its step. A compilation takes the seconds
that the environment variable ``TUNE_WORKER_COMPILES`` names. Needs nothing but Python.
"""

import json
import os
import sys
import time

for line in sys.stdin:
    request = json.loads(line)
    reply: dict = {}
    if sys.argv[1] == "compile":
        time.sleep(float(os.environ.get("TUNE_WORKER_COMPILES", "0")))
        if request["fields"].get("num_stages") == 4:
            reply = {"failed": "does not compile", "why": "no registers"}
    elif "finalists" in request:
        reply = {"samples": [[1e-6 * f["block_n"]] * request["samples"] for f in request["finalists"]]}
    else:
        fields = request["fields"]
        if fields["block_m"] == 64 and fields["block_n"] == 32:
            print("MLIR has had enough", file=sys.stderr, flush=True)
            os.abort()
        if fields["block_m"] == 64 and fields["block_n"] == 64:
            time.sleep(600)
        if fields["block_m"] == 64 and fields["block_n"] == 128:
            reply = {"failed": "wrong result", "why": "result 0: error 1, allowed 0.01"}
        elif fields["block_m"] == 64 and fields["block_n"] == 16:
            reply = {"failed": "CUDA error", "why": "an illegal memory access was encountered", "last": True}
        else:
            samples = [1e-6 * fields["block_n"]] * request["samples"]
            check = {"name": "result 0", "error": 0.0, "allowed": 1.0}
            reply = {"samples": samples, "first_call_s": 0.5, "bits": str(fields["block_n"]), "check": check}
            reply["process"] = os.getpid()
    print(json.dumps(reply), flush=True)
    if reply.get("last"):
        time.sleep(1)  # a process takes its time to end, and must not get the next request meanwhile
        sys.exit()
