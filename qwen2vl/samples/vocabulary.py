"""Characters and words that pictures show as text, and which strings are for evaluation alone.

:func:`is_held_out` keeps an eighth of all strings of two or more characters from training, by their CRC-32: no training
sample shows one of these as the text to read, compare, find or type. Single characters are in both splits, because
nothing else could teach them.
"""

from __future__ import annotations

import zlib

#: Digits and capital letters that a reader can tell apart even where one stands alone: O looks like 0, and I like 1.
CLEAR = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"
#: These and the small letters that do not look like their capitals. Words hold all letters.
ALPHABET = CLEAR + "abdefghimnqrt"
# Short common words; `is_held_out` chooses the eighth of each list that is for evaluation alone.
_ENGLISH = """
    air all and ant apple arm art ask ball bank bath bed bell bird blue boat book box boy bread bus cake call car cat
    chair city coat cold cow cup day desk dog door down duck ear east egg end eye face farm fire fish five food foot
    four fox game gate gift girl glass goat gold good green hand hat help home horse hot house ice ink jam key king kite
    lake lamp leaf left lemon light lion list lock long lost map milk mirror moon mouse music nail name nest net new
    night nine north note one open orange owl page paper park pen pig pink plan plate point pond queen rain red rice
    ring river road rock room rose run sail salt sand sea seed seven ship shoe shop six sky snow soap sock song soup
    south spoon star stop street sugar sun table tea ten three tiger time top town train tree two up van wall water
    way west white wind wolf wood yard year yes zoo
"""
_VIETNAMESE = """
    mẹ bố nhà cửa bàn ghế sách bút chó mèo gà vịt cá bò ngựa cây hoa quả nước lửa đất trời mưa nắng gió mây sông biển
    núi đường phố chợ trường lớp bạn thầy cơm phở bánh sữa trà muối đỏ xanh vàng trắng đen một hai ba bốn năm sáu bảy
    tám chín mười
"""
ENGLISH, VIETNAMESE = tuple(_ENGLISH.split()), tuple(_VIETNAMESE.split())


def is_held_out(text: str) -> bool:
    """Whether the string is for evaluation alone; see the module."""
    return len(text) > 1 and zlib.crc32(text.encode("utf-8")) % 8 == 0
