"""The vision tower, trained with a small text encoder by the contrastive objective."""

from __future__ import annotations

import random
from dataclasses import asdict
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from llava_train.demo import easy_vqa
from llava_train.demo.easy_vqa import CAPTION_FORMS, Scene
from tiny_backbones.plan import Picture, Plan, VisionSizes, fit


class TinyCLIP(nn.Module):
    """A CLIP vision tower and a small text encoder with a common space to compare pictures and captions in.

    The text encoder adds up word embeddings. (A transformer here collapses: before the tower tells shapes apart, the
    easiest way to a lower loss is to make the captions of all shapes alike, and then no gradient is left to learn
    shapes from.) Besides the tower's pooled output, the mean of the patch features that LLaVA reads is compared too.
    """

    def __init__(self, sizes: VisionSizes, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.vision = CLIPVisionModel(CLIPVisionConfig(**asdict(sizes)))
        self.pooled = nn.Linear(sizes.hidden_size, width, bias=False)
        self.patches = nn.Sequential(nn.LayerNorm(sizes.hidden_size), nn.Linear(sizes.hidden_size, width, bias=False))
        self.words = nn.EmbeddingBag(vocabulary, width, mode="sum")
        self.text = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors from the pooled output and from the patch features of the last layer but one."""
        out = self.vision(pixel_values=pixels, output_hidden_states=True)
        patches = out.hidden_states[-2][:, 1:].mean(1)
        return F.normalize(self.pooled(out.pooler_output), dim=-1), F.normalize(self.patches(patches), dim=-1)

    def encode_texts(self, texts: list[list[int]]) -> torch.Tensor:
        """Unit vectors of tokenized captions."""
        starts = torch.tensor([0, *accumulate(map(len, texts[:-1]))])
        words = self.words(torch.tensor(list(chain.from_iterable(texts))), starts)
        return F.normalize(self.text(words / 2), dim=-1)


def make_vision_tower(
    tokenizer: PreTrainedTokenizerFast,
    train: list[Picture],
    held_out: list[Picture],
    plan: Plan,
    seed: int,
    out: Path,
) -> dict[str, object]:
    """Train the tower against captions, save its folder and return its figures."""
    torch.manual_seed(seed)
    clip, rng = TinyCLIP(plan.vision, len(tokenizer)), random.Random(seed)
    processor = image_processor(plan.vision.image_size)
    train = [picture for picture in train if picture.scene.complete]
    pixels = load_pixels(train, processor)
    rooms = [room_around(image) for image in pixels]

    def loss(size: int, progress: float) -> torch.Tensor:
        rows = rng.sample(range(len(train)), size)
        images = torch.stack([augmented(pixels[row], rooms[row], rng) for row in rows])
        captions = [train[row].scene.caption(rng.choice(CAPTION_FORMS)) for row in rows]
        scenes = torch.tensor([scene_number(train[row].scene) for row in rows])
        return contrastive_loss(clip, images, tokenizer(captions)["input_ids"], scenes)

    final_loss = fit(clip, loss, plan.contrastive, "vision tower")
    clip.eval()
    pooled, patches = retrieval_accuracy(clip, held_out, tokenizer, processor)
    save_vision_tower(clip.vision, processor, out)
    return {
        "vision tower parameters": sum(p.numel() for p in clip.vision.parameters()),
        "contrastive training loss": round(final_loss, 4),
        "caption retrieval of 24, pooled output (held-out pictures)": pooled,
        "caption retrieval of 24, patch features LLaVA reads (held-out pictures)": patches,
    }


def image_processor(size: int) -> CLIPImageProcessor:
    """Pictures in CLIP's pre-processing at the tower's size; mean and deviation are those of the train split."""
    return CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0.9, 0.9, 0.9],
        image_std=[0.2, 0.2, 0.2],
    )


def load_pixels(pictures: list[Picture], processor: CLIPImageProcessor) -> torch.Tensor:
    """The pictures as the tower takes them, in one tensor."""
    folder = easy_vqa.image_folder("train")
    images = [Image.open(folder / f"{picture.image_id}.png").convert("RGB") for picture in pictures]
    return torch.as_tensor(np.stack(processor(images)["pixel_values"]))


def room_around(image: torch.Tensor) -> tuple[int, int, int, int]:
    """How far the shape can move up, down, left and right on its even background."""
    background = image.flatten(1).median(1).values[:, None, None]
    shape = (image - background).abs().sum(0) > 0.3
    rows, columns = (shape.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return rows[0], shape.shape[0] - 1 - rows[-1], columns[0], shape.shape[1] - 1 - columns[-1]


def augmented(image: torch.Tensor, room: tuple[int, int, int, int], rng: random.Random) -> torch.Tensor:
    """The shape moved to a random place of the picture, and mirrored half of the time."""
    up, down, left, right = room
    moved = torch.roll(image, (rng.randint(-up, down), rng.randint(-left, right)), (1, 2))
    return moved.flip(-1) if rng.random() < 0.5 else moved


def contrastive_loss(
    clip: TinyCLIP, pixels: torch.Tensor, captions: list[list[int]], scenes: torch.Tensor
) -> torch.Tensor:
    """InfoNCE in both directions; all pairs of the same scene in the batch are positives, with equal shares."""
    positive = (scenes[:, None] == scenes[None, :]).float()
    target = positive / positive.sum(1, keepdim=True)
    texts = clip.encode_texts(captions)
    loss = torch.zeros(())
    for images in clip.encode_images(pixels):
        logits = clip.log_scale.exp() * images @ texts.T
        loss = loss + (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 4
    return loss


def scene_number(scene: Scene) -> int:
    """The number, 0 to 23, of a fully known scene."""
    assert scene.shape and scene.color
    return easy_vqa.SHAPES.index(scene.shape) * len(easy_vqa.COLORS) + easy_vqa.COLORS.index(scene.color)


@torch.inference_mode()
def retrieval_accuracy(
    clip: TinyCLIP, pictures: list[Picture], tokenizer: PreTrainedTokenizerFast, processor: CLIPImageProcessor
) -> list[float]:
    """How often the right one of the 24 possible captions is nearest, by pooled output and by patch features."""
    pictures = [picture for picture in pictures if picture.scene.complete]
    captions = [Scene(shape, color).caption() for shape in easy_vqa.SHAPES for color in easy_vqa.COLORS]
    texts = clip.encode_texts(tokenizer(captions)["input_ids"])
    truth = torch.tensor([scene_number(picture.scene) for picture in pictures])
    vectors = clip.encode_images(load_pixels(pictures, processor))
    return [round(((images @ texts.T).argmax(1) == truth).float().mean().item(), 4) for images in vectors]


def save_vision_tower(tower: CLIPVisionModel, processor: CLIPImageProcessor, out: Path) -> None:
    """Save as a `CLIPVisionModel` folder under the classic `vision_model.*` names, which every release loads."""
    tower.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)
    file = out / "model.safetensors"
    tensors = {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
