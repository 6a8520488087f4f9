"""Llama 3.2-Vision: layers of the decoder look at pictures in tiles; one `<|image|>` a picture stands in the text.

transformers' own class computes everything; here is what it is called with, by the rules of its processor.

Shapes: B rows, T columns, D LLM width, I pictures, M pictures of the row that has the most, N tiles that a picture is
padded to, P positions of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import MllamaForConditionalGeneration, PretrainedConfig, PreTrainedModel

from llava_train.model.families.base import Family, Pictures, Text


class Mllama(Family):
    """`MllamaForConditionalGeneration`: facts of a picture are `tiles` and `aspect_ratio_ids`.

    Every row is computed as the stock class computes it alone, whatever other rows the batch has. That class lets
    positions before the first picture look at all pictures alike (only the feed-forward of its cross-attention is
    masked for them), padding among them; so a row sees its own ones there. A row of text alone passes such layers
    unchanged: keys and values of zeros add nothing, no layer between them and the hidden states having a bias.
    """

    model_class = MllamaForConditionalGeneration
    image_token = "<|image|>"
    marker = "<|image|>"
    line_end = ""  # pictures that a line parts are no run: text would see the last one alone
    packs = False
    separable = False
    measured = False
    looks = True
    mixes = False

    def describe(self, config: PretrainedConfig, image_processor: Any) -> dict[str, Any]:
        """One token a picture; tiles are the processor's own."""
        return {
            "connector": "stock",
            "image_size": int(image_processor.size["height"]),
            "image_tokens": 1,
            "image_aspect_ratio": "tiles",
        }

    def blank(self, model: PreTrainedModel, features: bool, like: torch.Tensor) -> Pictures:
        """One tile of zeros."""
        assert not features, "features are not made before the connector"
        size = model.config.vision_config.image_size
        facts = {"tiles": torch.tensor([1]), "aspect_ratio_ids": torch.tensor([1])}
        return Pictures(like.new_zeros(1, 3, size, size), None, facts)

    def states(self, model: PreTrainedModel, pictures: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
        """The connector's output, (I, N, P, D), and which of the tiles are real, (I, N)."""
        inner = model.model
        pixels, real = _tiled(model, pictures)
        seen = inner.vision_model(
            pixel_values=pixels.unsqueeze(1),
            aspect_ratio_ids=pictures.facts["aspect_ratio_ids"].to(pixels.device).unsqueeze(1),
            aspect_ratio_mask=real.long().unsqueeze(1),
        ).last_hidden_state
        return inner.multi_modal_projector(seen).squeeze(1), real

    def decoder_inputs(
        self,
        model: PreTrainedModel,
        text: Text,
        embeddings_BTD: torch.Tensor,
        states: tuple[torch.Tensor, torch.Tensor],
        shown: bool,
    ) -> dict[str, Any]:
        """The embeddings as they are; keys, values and mask of the layers that look at pictures.

        A blank picture is one key of zeros: those layers are run, so that their weights have gradients, of zero.
        """
        tokens_INPD, real_IN = states
        tokens_INPD = tokens_INPD.to(embeddings_BTD.dtype)
        rows, columns, width = embeddings_BTD.shape
        if shown:
            places = Places(text.input_ids == self.image_token_id(model))
            keys = places.spread(tokens_INPD).flatten(1, 3)
            sees = (places.seen[..., None] & places.spread(real_IN)[:, None]).flatten(2)
            own = places.filled[..., None].expand(-1, -1, real_IN.shape[1]).flatten(1)
            sees, own = (each.repeat_interleave(tokens_INPD.shape[2], -1) for each in (sees, own))
        else:
            keys = embeddings_BTD.new_zeros(rows, 1, width) + 0.0 * tokens_INPD.sum()
            sees, own = keys.new_zeros(rows, columns, 1, dtype=torch.bool), keys.new_ones(rows, 1, dtype=torch.bool)
        some = sees.any(-1, keepdim=True)
        looked_at = sees | (~some & (own | ~own.any(-1, keepdim=True)).unsqueeze(1))
        bias = embeddings_BTD.new_zeros(looked_at.shape).masked_fill(~looked_at, torch.finfo(embeddings_BTD.dtype).min)
        return {
            "inputs_embeds": embeddings_BTD,
            "cross_attention_states": keys,
            "cross_attention_mask": bias.unsqueeze(1),
            "full_text_row_masked_out_mask": some.to(embeddings_BTD.dtype).unsqueeze(1),
        }

    def prompt_inputs(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, pictures: Pictures | None
    ) -> dict[str, torch.Tensor]:
        """What the stock class takes; rows must have equally many pictures to be computed as they are alone."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if pictures is None:
            return inputs
        places = Places(input_ids == self.image_token_id(model))
        pixels, real = _tiled(model, pictures)
        tiles = places.spread(real)
        mask = tiles.clone()
        mask[..., 0] = True  # as the processor has it for pictures that fill up a row
        return {
            **inputs,
            "pixel_values": places.spread(pixels),
            "aspect_ratio_ids": places.spread(pictures.facts["aspect_ratio_ids"].to(input_ids.device)),
            "aspect_ratio_mask": mask.long(),
            "cross_attention_mask": (places.seen[..., None] & tiles[:, None]).long(),
        }


class Places:
    """Where the pictures of a batch stand, by `stands`, (B, T), True at each picture's token.

    Attributes:
        filled: which pictures each row has, (B, M).
        seen: which of them each position sees, (B, T, M): the last one up to there, and those that stand right before
            it without text between.
    """

    def __init__(self, stands: torch.Tensor) -> None:
        up_to_here = stands.cumsum(1)
        number = torch.arange(int(up_to_here[:, -1].max()), device=stands.device)
        self.filled = number < up_to_here[:, -1:]
        begins = stands.clone()
        begins[:, 1:] &= ~stands[:, :-1]
        run = begins.cumsum(1)
        run_of_picture = self.spread(run[stands])
        self.seen = (number < up_to_here[..., None]) & (run_of_picture[:, None] == run[..., None])

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of each picture, (I, ...), by row, (B, M, ...); zeros where a row has no such picture."""
        made = values.new_zeros(*self.filled.shape, *values.shape[1:])
        made[self.filled] = values
        return made


def _tiled(model: PreTrainedModel, pictures: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels of pictures filled up with tiles of zeros, (I, N, 3, H, W), and which tiles are real, (I, N)."""
    pixels = pictures.pixel_values
    assert pixels is not None, "pictures bring pixels"
    counts = pictures.facts["tiles"].to(pixels.device)
    real = torch.arange(model.config.vision_config.max_num_tiles, device=pixels.device) < counts[:, None]
    filled = pixels.new_zeros(*real.shape, *pixels.shape[1:])
    filled[real] = pixels
    return filled, real
