"""Processors of exported folders: prompts and pictures -> ids and pixels.

Pictures are brought to shape by the folder's image processor in its PIL variant: the model was trained on its pixels,
and what torchvision computes is a little different.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import LlavaNextProcessor, LlavaOnevisionProcessor
from transformers.processing_utils import MultiModalData, ProcessorMixin

from llava_train.model.families.questions import padded, questions_in


class _Pil:
    """Chooses the variant of the image processor."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of every processor."""
        return super().from_pretrained(*args, **{"backend": "pil", **kwargs})  # type: ignore[misc]


class LlavaTrainProcessor(_Pil, ProcessorMixin):
    """Each `<image>` of the text becomes as many as the model has tokens for a picture."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        image_tokens: int = 1,
        **_: Any,
    ) -> None:
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.image_tokens = image_tokens
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **_: Any) -> str:
        """What stands for a picture in the text."""
        return self.image_token * self.image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **_: Any) -> MultiModalData:
        """Tokens of pictures by their sizes, for servers that plan ahead: always the same."""
        count = len(image_sizes or ())
        return MultiModalData(num_image_tokens=[self.image_tokens] * count, num_image_patches=[1] * count)


class LlavaTrainInstructedProcessor(LlavaTrainProcessor):
    """For a connector that reads the question: its ids go beside the pixels, `question_ids` and `question_mask`.

    The question about a picture is the text behind it up to where it is answered: `answer_begins` ends it.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        image_tokens: int = 1,
        answer_begins: str = "",
        **_: Any,
    ) -> None:
        self.answer_begins = answer_begins
        super().__init__(image_processor, tokenizer, chat_template, image_token, image_tokens)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """As of every processor, and tensors (pictures, longest question) of the questions."""
        made = super().__call__(images=images, text=text, **kwargs)
        if images is not None and text is not None:
            texts = [text] if isinstance(text, str) else text
            asked = [question for each in texts for question in self._questions(each)]
            made["question_ids"], made["question_mask"] = padded(asked, "cpu")
        return made

    def _questions(self, text: str) -> list[list[int]]:
        text = text.replace(self.image_token, self.image_token * self.image_tokens)
        ends = [match.end() for match in re.finditer(re.escape(self.answer_begins), text)]
        until = [len(self._ids(text[:end])) for end in ends]
        return questions_in(self._ids(text), self.image_token_id, self.image_tokens, until)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class LlavaTrainNextProcessor(_Pil, LlavaNextProcessor):
    """LLaVA-NeXT's, for pictures in tiles."""


class LlavaTrainOnevisionProcessor(_Pil, LlavaOnevisionProcessor):
    """LLaVA-OneVision's, without a part for videos."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        vision_aspect_ratio: str = "anyres_max_9",
        **_: Any,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            None,
            num_image_tokens,
            vision_feature_select_strategy,
            chat_template,
            image_token,
            vision_aspect_ratio=vision_aspect_ratio,
        )
