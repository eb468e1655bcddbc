"""What generated samples say, in five languages: names of things, questions and answers.

Pictures never hold Chinese, Korean or Arabic text, since no font for these ships with Python packages; prompts and
answers do.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Language -> per cent of the samples.
LANGUAGES = {"en": 40, "zh": 30, "ko": 10, "ar": 10, "vi": 10}

#: Name -> red, green, blue; far enough apart for a person to name each without the others beside it.
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

# In the order of COLOURS and of SHAPES. Arabic adjectives: masculine, feminine.
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
_FEMININE = ("circle", "star")  # in Arabic


def colour_name(colour: str, language: str) -> str:
    return colour if language == "en" else _COLOUR_NAMES[language][list(COLOURS).index(colour)]


def shape_name(shape: str, language: str) -> str:
    return shape if language == "en" else _SHAPE_NAMES[language][SHAPES.index(shape)]


def thing_name(colour: str, shape: str, language: str) -> str:
    """Colour and shape together, "red circle"."""
    what = shape_name(shape, language)
    which = colour_name(colour, language)
    if language == "ar":
        return f"{what} {_ARABIC_FEMININE[list(COLOURS).index(colour)] if shape in _FEMININE else which}"
    if language == "vi":
        return f"{what} {which}"
    return f"{which}{what}" if language == "zh" else f"{which} {what}"


_ANY_SHAPE = {"zh": "图形", "ko": "도형", "ar": "شكل", "vi": "hình"}


def kind_name(colour: str | None, shape: str | None, language: str) -> str:
    """What several things have in common, a colour, a shape or both; in English a plural, "red shapes"."""
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
# Arabic puts the verb first, in the gender of the thing: (masculine, feminine, what follows the thing).
_ARABIC_EVENTS = {
    "still": ("لا يتحرك", "لا تتحرك", ""),
    "appear": ("يظهر", "تظهر", ""),
    "disappear": ("يختفي", "تختفي", ""),
    "grow": ("يكبر", "تكبر", ""),
    "shrink": ("يصغر", "تصغر", ""),
    **{name: ("يتحرك", "تتحرك", f" {words}") for name, words in DIRECTION_NAMES["ar"].items()},
}


def event_sentence(event: str, colour: str, shape: str, language: str) -> str:
    """What the thing does, as a sentence."""
    thing = thing_name(colour, shape, language)
    if language == "ar":
        masculine, feminine, rest = _ARABIC_EVENTS[event]
        return f"{feminine if shape in _FEMININE else masculine} {thing}{rest}."
    phrase = _EVENT_PHRASES[language][event]
    if language == "zh":
        return f"{thing}{phrase}。"
    if language == "ko":
        closed = (ord(thing[-1]) - 0xAC00) % 28 != 0  # the subject's particle depends on the last syllable's end
        return f"{thing}{'이' if closed else '가'} {phrase}."
    if language == "vi":
        return f"Một {thing} {phrase}."
    return f"{'An' if thing[0] in 'aeiou' else 'A'} {thing} {phrase}."


# ---- questions ----

#: Question -> language -> wordings, with {} for what is asked about.
QUESTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "read": {
        "en": ("Read the text.", "What does it say?", "What is written in the picture?"),
        "zh": ("读出文字。", "图中写着什么？", "图片里的文字是什么？"),
        "ko": ("글자를 읽어 주세요.", "무엇이라고 쓰여 있나요?"),
        "ar": ("اقرأ النص.", "ما المكتوب في الصورة؟"),
        "vi": ("Đọc chữ trong ảnh.", "Trong ảnh viết gì?"),
    },
    "colour": {
        "en": ("What colour is it?", "Which colour is the shape?"),
        "zh": ("它是什么颜色？", "图形是什么颜色？"),
        "ko": ("무슨 색인가요?",),
        "ar": ("ما لون الشكل؟",),
        "vi": ("Hình này màu gì?",),
    },
    "shape": {
        "en": ("What shape is it?", "Which shape is this?"),
        "zh": ("它是什么形状？", "这是什么图形？"),
        "ko": ("무슨 모양인가요?",),
        "ar": ("ما هذا الشكل؟",),
        "vi": ("Đây là hình gì?",),
    },
    "describe": {
        "en": ("Describe the picture.", "What is in the picture?"),
        "zh": ("描述图片。", "图中有什么？"),
        "ko": ("그림을 설명해 주세요.",),
        "ar": ("صف الصورة.",),
        "vi": ("Mô tả bức ảnh.",),
    },
    "describe in order": {
        "en": ("Describe the picture from left to right.", "What is in the picture, from left to right?"),
        "zh": ("从左到右描述图片。", "从左到右，图中有什么？"),
        "ko": ("왼쪽부터 오른쪽으로 그림을 설명해 주세요.",),
        "ar": ("صف الصورة من اليسار إلى اليمين.",),
        "vi": ("Mô tả bức ảnh từ trái sang phải.",),
    },
    "colour of": {
        "en": ("What colour is the {}?", "Which colour does the {} have?"),
        "zh": ("{}是什么颜色？", "图中的{}是什么颜色？"),
        "ko": ("{}: 무슨 색인가요?",),
        "ar": ("ما لون ال{}؟",),
        "vi": ("{} có màu gì?",),
    },
    "shape of": {
        "en": ("What shape is {}?", "Which shape is {}?"),
        "zh": ("{}的是什么形状？", "哪个形状是{}的？"),
        "ko": ("{}: 무슨 모양인가요?",),
        "ar": ("أي شكل لونه {}؟",),
        "vi": ("Hình nào {}?",),
    },
    "count all": {
        "en": ("How many shapes are there?", "Count the shapes."),
        "zh": ("有多少个图形？", "数一数图形的个数。"),
        "ko": ("도형이 몇 개 있나요?",),
        "ar": ("كم عدد الأشكال؟",),
        "vi": ("Có bao nhiêu hình?",),
    },
    "count": {
        "en": ("How many {} are there?", "Count the {}."),
        "zh": ("{}有多少个？", "数一数{}的个数。"),
        "ko": ("{}: 몇 개 있나요?",),
        "ar": ("كم عدد: {}؟",),
        "vi": ("Có bao nhiêu: {}?",),
    },
    "same colour": {
        "en": ("Do both shapes have the same colour?", "Are both shapes of one colour?"),
        "zh": ("两个图形的颜色相同吗？", "两个图形颜色一样吗？"),
        "ko": ("두 도형의 색이 같나요?",),
        "ar": ("هل للشكلين اللون نفسه؟",),
        "vi": ("Hai hình có cùng màu không?",),
    },
    "same shape": {
        "en": ("Do both pictures show the same shape?", "Is the shape the same?"),
        "zh": ("两张图的形状相同吗？", "形状一样吗？"),
        "ko": ("두 그림의 모양이 같나요?",),
        "ar": ("هل الشكل نفسه في الصورتين؟",),
        "vi": ("Hai ảnh có cùng hình dạng không?",),
    },
    "difference": {
        "en": ("What differs, the colour or the shape?", "Which is different, the colour or the shape?"),
        "zh": ("颜色和形状，哪个不同？", "不同的是颜色还是形状？"),
        "ko": ("색과 모양 중 무엇이 다른가요?",),
        "ar": ("ما الذي يختلف، اللون أم الشكل؟",),
        "vi": ("Màu sắc hay hình dạng khác nhau?",),
    },
    "which has more": {
        "en": ("Which picture has more shapes?", "Where are more shapes?"),
        "zh": ("哪张图的图形更多？", "哪张图片里图形多？"),
        "ko": ("어느 그림에 도형이 더 많나요?",),
        "ar": ("أي صورة فيها أشكال أكثر؟",),
        "vi": ("Ảnh nào có nhiều hình hơn?",),
    },
    "same text": {
        "en": ("Do both pictures show the same text?", "Is the text the same?"),
        "zh": ("两张图的文字相同吗？", "文字一样吗？"),
        "ko": ("두 그림의 글자가 같나요?",),
        "ar": ("هل النص نفسه في الصورتين؟",),
        "vi": ("Hai ảnh có cùng chữ không?",),
    },
    "find": {
        "en": ("Find the {}.", "Where is the {}?"),
        "zh": ("找出{}。", "{}在哪里？"),
        "ko": ("찾아 주세요: {}.",),
        "ar": ("أين: {}؟",),
        "vi": ("Tìm: {}.",),
    },
    "find text": {
        "en": ('Find the text "{}".', 'Where is "{}" written?'),
        "zh": ("找出文字“{}”。", "“{}”写在哪里？"),
        "ko": ('글자 찾기: "{}".',),
        "ar": ('أين النص "{}"؟',),
        "vi": ('Tìm chữ "{}".',),
    },
    "find all": {
        "en": ("Find all {}.", "Where are the {}?"),
        "zh": ("找出所有{}。", "所有{}在哪里？"),
        "ko": ("모두 찾아 주세요: {}.",),
        "ar": ("أين كل: {}؟",),
        "vi": ("Tìm tất cả: {}.",),
    },
    "direction": {
        "en": ("Which way does it move?", "Where does it go?"),
        "zh": ("它往哪个方向移动？", "它向哪里移动？"),
        "ko": ("어느 쪽으로 움직이나요?",),
        "ar": ("إلى أين يتحرك؟",),
        "vi": ("Nó di chuyển hướng nào?",),
    },
    "what happens": {
        "en": ("What happens in the video?", "Describe the video."),
        "zh": ("视频里发生了什么？", "描述视频。"),
        "ko": ("영상에서 무슨 일이 일어나나요?",),
        "ar": ("ماذا يحدث في الفيديو؟",),
        "vi": ("Điều gì xảy ra trong video?",),
    },
    "what moves": {
        "en": ("What moves, and where?", "What moves in the video, and which way?"),
        "zh": ("什么在移动，往哪里？", "视频里什么在移动？往哪个方向？"),
        "ko": ("무엇이 어느 쪽으로 움직이나요?",),
        "ar": ("ما الذي يتحرك وإلى أين؟",),
        "vi": ("Cái gì di chuyển và hướng nào?",),
    },
}

# ---- the screen game ----

#: An instruction is the sentences of its steps; each is said again, as the thought before the call that takes it.
SCREEN = {
    "en": {"tap": 'Tap "{}".', "type": 'Type "{}".', "field": "Tap the field.", "done": "Done."},
    "zh": {"tap": "点击“{}”。", "type": "输入“{}”。", "field": "点击输入框。", "done": "完成。"},
    "ko": {"tap": '"{}" 누르기.', "type": '"{}" 입력하기.', "field": "입력란 누르기.", "done": "완료."},
    "ar": {"tap": 'اضغط على "{}".', "type": 'اكتب "{}".', "field": "اضغط على الحقل.", "done": "تم."},
    "vi": {"tap": 'Nhấn "{}".', "type": 'Nhập "{}".', "field": "Nhấn vào ô nhập.", "done": "Xong."},
}
