"""The wordings of questions and of the screen game's instructions, in the five languages of generated samples."""

from __future__ import annotations

from collections.abc import Mapping

#: Question -> language -> its wordings, with {} in the place of what is asked about.
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

#: The sentences of the screen game's steps. An instruction is made of them, and each is said again as the thought
#: before the call that takes the step.
SCREEN = {
    "en": {"tap": 'Tap "{}".', "type": 'Type "{}".', "field": "Tap the field.", "done": "Done."},
    "zh": {"tap": "点击“{}”。", "type": "输入“{}”。", "field": "点击输入框。", "done": "完成。"},
    "ko": {"tap": '"{}" 누르기.', "type": '"{}" 입력하기.', "field": "입력란 누르기.", "done": "완료."},
    "ar": {"tap": 'اضغط على "{}".', "type": 'اكتب "{}".', "field": "اضغط على الحقل.", "done": "تم."},
    "vi": {"tap": 'Nhấn "{}".', "type": 'Nhập "{}".', "field": "Nhấn vào ô nhập.", "done": "Xong."},
}
