"""Names of things, and the words of answers, in the five languages of generated samples.

Chinese, Korean and Arabic appear in prompts and answers alone, never in a picture: no Python package that samples need
brings a font for them.
"""

from __future__ import annotations

#: Language -> its share of the samples in per cent.
LANGUAGES = {"en": 40, "zh": 30, "ko": 10, "ar": 10, "vi": 10}

#: Name -> (red, green, blue), far enough apart that a person names each without seeing the others.
COLOURS = {
    "red": (214, 32, 38),
    "green": (32, 150, 62),
    "blue": (36, 80, 214),
    "yellow": (250, 216, 40),
    "orange": (246, 132, 22),
    "purple": (128, 44, 164),
    "pink": (250, 150, 192),
    "brown": (122, 72, 36),
    "black": (16, 16, 18),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

# In the order of COLOURS and of SHAPES. Arabic adjectives agree with the noun: these are masculine.
_COLOUR_NAMES = {
    "zh": ("红色", "绿色", "蓝色", "黄色", "橙色", "紫色", "粉色", "棕色", "黑色", "白色"),
    "ko": ("빨간색", "초록색", "파란색", "노란색", "주황색", "보라색", "분홍색", "갈색", "검은색", "흰색"),
    "ar": ("أحمر", "أخضر", "أزرق", "أصفر", "برتقالي", "بنفسجي", "وردي", "بني", "أسود", "أبيض"),
    "vi": ("màu đỏ", "màu xanh lá", "màu xanh dương", "màu vàng", "màu cam", "màu tím", "màu hồng", "màu nâu",
           "màu đen", "màu trắng"),
}  # fmt: skip
_ARABIC_FEMININE = (
    "حمراء", "خضراء", "زرقاء", "صفراء", "برتقالية", "بنفسجية", "وردية", "بنية", "سوداء", "بيضاء",
)  # fmt: skip
_SHAPE_NAMES = {
    "zh": ("圆形", "正方形", "三角形", "星形", "菱形", "十字形", "心形"),
    "ko": ("원", "정사각형", "삼각형", "별", "마름모", "십자", "하트"),
    "ar": ("دائرة", "مربع", "مثلث", "نجمة", "معين", "صليب", "قلب"),
    "vi": ("hình tròn", "hình vuông", "hình tam giác", "hình ngôi sao", "hình thoi", "hình chữ thập", "hình trái tim"),
}
#: The shapes whose Arabic nouns are feminine.
_FEMININE = ("circle", "star")


def colour_name(colour: str, language: str) -> str:
    """The colour's name; in Arabic the masculine adjective."""
    return colour if language == "en" else _COLOUR_NAMES[language][list(COLOURS).index(colour)]


def shape_name(shape: str, language: str) -> str:
    """The shape's name, without an article."""
    return shape if language == "en" else _SHAPE_NAMES[language][SHAPES.index(shape)]


def thing_name(colour: str, shape: str, language: str) -> str:
    """Colour and shape in one name, such as "red circle"."""
    what = shape_name(shape, language)
    which = colour_name(colour, language)
    if language == "ar":
        return f"{what} {_ARABIC_FEMININE[list(COLOURS).index(colour)] if shape in _FEMININE else which}"
    if language == "vi":
        return f"{what} {which}"
    return f"{which}{what}" if language == "zh" else f"{which} {what}"


_ANY_SHAPE = {"zh": "图形", "ko": "도형", "ar": "شكل", "vi": "hình"}


def kind_name(colour: str | None, shape: str | None, language: str) -> str:
    """The name of several things that share a colour, a shape or both; in English a plural such as "red shapes"."""
    if language == "en":
        noun = shape or "shape"
        words = [*([colour] if colour else []), noun + ("es" if noun.endswith("s") else "s")]
        return " ".join(words)
    if shape is None:
        which, what = colour_name(str(colour), language), _ANY_SHAPE[language]
        after = language in ("ar", "vi")
        return f"{what} {which}" if after else f"{which}{what}" if language == "zh" else f"{which} {what}"
    return shape_name(shape, language) if colour is None else thing_name(colour, shape, language)


# ---- words of one answer ----

YES_NO = {
    "en": ("yes", "no"),
    "zh": ("是", "否"),
    "ko": ("예", "아니요"),
    "ar": ("نعم", "لا"),
    "vi": ("có", "không"),
}
DIRECTION_NAMES = {
    "en": {"left": "left", "right": "right", "up": "up", "down": "down"},
    "zh": {"left": "向左", "right": "向右", "up": "向上", "down": "向下"},
    "ko": {"left": "왼쪽으로", "right": "오른쪽으로", "up": "위로", "down": "아래로"},
    "ar": {"left": "إلى اليسار", "right": "إلى اليمين", "up": "إلى أعلى", "down": "إلى أسفل"},
    "vi": {"left": "sang trái", "right": "sang phải", "up": "lên trên", "down": "xuống dưới"},
}
#: (only the colour, only the shape, both, nothing) differs
DIFFERENCES = {
    "en": ("colour", "shape", "colour and shape", "nothing"),
    "zh": ("颜色", "形状", "颜色和形状", "没有不同"),
    "ko": ("색", "모양", "색과 모양", "없음"),
    "ar": ("اللون", "الشكل", "اللون والشكل", "لا شيء"),
    "vi": ("màu sắc", "hình dạng", "màu sắc và hình dạng", "không có gì"),
}
#: (the first, the second, neither) has more
WHICH_PICTURE = {
    "en": ("the first", "the second", "equal"),
    "zh": ("第一张", "第二张", "一样多"),
    "ko": ("첫 번째", "두 번째", "같음"),
    "ar": ("الأولى", "الثانية", "متساويتان"),
    "vi": ("ảnh thứ nhất", "ảnh thứ hai", "bằng nhau"),
}
SEPARATOR = {"en": ", ", "zh": "，", "ko": ", ", "ar": "، ", "vi": ", "}


# ---- what happens in a clip ----

EVENTS = ("left", "right", "up", "down", "still", "appear", "disappear", "grow", "shrink")
_EVENTS_EN = {"still": "stands still", "appear": "appears", "disappear": "disappears", "grow": "grows"}
_EVENT_PHRASES: dict[str, dict[str, str]] = {
    "en": {**_EVENTS_EN, "shrink": "shrinks", "left": "moves left", "right": "moves right", "up": "moves up",
           "down": "moves down"},
    "zh": {"still": "静止不动", "appear": "出现", "disappear": "消失", "grow": "变大", "shrink": "变小",
           **{name: f"{words}移动" for name, words in DIRECTION_NAMES["zh"].items()}},
    "ko": {"still": "멈춰 있습니다", "appear": "나타납니다", "disappear": "사라집니다", "grow": "커집니다",
           "shrink": "작아집니다", **{name: f"{words} 움직입니다" for name, words in DIRECTION_NAMES["ko"].items()}},
    "vi": {"still": "đứng yên", "appear": "xuất hiện", "disappear": "biến mất", "grow": "to ra", "shrink": "nhỏ lại",
           **{name: f"di chuyển {words}" for name, words in DIRECTION_NAMES["vi"].items()}},
}  # fmt: skip
# Arabic puts the verb first, in the thing's gender: (masculine verb, feminine verb, what follows the thing).
_ARABIC_EVENTS = {
    "still": ("لا يتحرك", "لا تتحرك", ""),
    "appear": ("يظهر", "تظهر", ""),
    "disappear": ("يختفي", "تختفي", ""),
    "grow": ("يكبر", "تكبر", ""),
    "shrink": ("يصغر", "تصغر", ""),
    **{name: ("يتحرك", "تتحرك", f" {words}") for name, words in DIRECTION_NAMES["ar"].items()},
}


def event_sentence(event: str, colour: str, shape: str, language: str) -> str:
    """A sentence that says what the thing does, one of `EVENTS`."""
    thing = thing_name(colour, shape, language)
    if language == "ar":
        masculine, feminine, rest = _ARABIC_EVENTS[event]
        return f"{feminine if shape in _FEMININE else masculine} {thing}{rest}."
    phrase = _EVENT_PHRASES[language][event]
    if language == "zh":
        return f"{thing}{phrase}。"
    if language == "ko":
        closed = (ord(thing[-1]) - 0xAC00) % 28 != 0  # a syllable with a final consonant takes another subject particle
        return f"{thing}{'이' if closed else '가'} {phrase}."
    if language == "vi":
        return f"Một {thing} {phrase}."
    return f"{'An' if thing[0] in 'aeiou' else 'A'} {thing} {phrase}."
