"""Questions about pictures for ZipR1, checked before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor._errors import TersorError
from tersor._images import opened
from tersor.zoo.inspection import refused

if TYPE_CHECKING:
    from datasets import Dataset

#: Rows whose prompts are made and measured before a training starts.
MEASURED = 64


def load_questions(source: str, *, option: str = "--data") -> Dataset:
    """Questions with their pictures and answers.

    Args:
        source: A JSONL file, one question a line, with pictures named relative to it; a folder of
            `Dataset.save_to_disk`; or the name of a data set on the hub, with ``:split`` after it.
        option: Who names it, for messages.

    Returns:
        Columns ``prompt`` (messages), ``images`` and ``answer``.

    Raises:
        ValueError: For rows without question, answer or pictures, and pictures that cannot be read; it names the row.
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows = [_row(row, f"{option} {path}, line {number}", path.parent) for number, row in _lines(path, option)]
        if not rows:
            raise TersorError(f"{option} {path} holds no questions; write one JSON object a line")
        return questions(rows)
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    name, _, split = source.partition(":")
    with refused(f"{option} {source}"):
        found = load_from_disk(str(path)) if path.is_dir() else load_dataset(name, split=split or "train")
    if isinstance(found, DatasetDict):
        raise TersorError(f"{option} {source} holds several splits ({', '.join(found)}); give the folder of one")
    if not isinstance(found, Dataset):
        raise TersorError(f"{option} {source} is a {type(found).__name__}; give a data set that has a length")
    return questions(_row(row, f"{option} {source}, row {number}", None) for number, row in enumerate(found))


def questions(rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """Rows of ``prompt``, ``images`` (files or pictures) and ``answer`` as trl reads them; files open when needed."""
    from datasets import Dataset, Features, Image, List, concatenate_datasets

    listed = list(rows)
    asked = Dataset.from_dict({name: [row[name] for row in listed] for name in ("prompt", "answer")})
    shown = Dataset.from_dict({"images": [row["images"] for row in listed]}, features=Features(images=List(Image())))
    return concatenate_datasets([asked, shown], axis=1)


def check_prompts(data: Dataset, processor: Any, min_tokens: int, *, option: str = "--data") -> int:
    """Make the prompts of the first rows, as a training will.

    Returns:
        Tokens of the longest one.

    Raises:
        ValueError: If one cannot be made, or would be read densely because it has fewer than ``min_tokens``.
    """
    longest = 0
    for number in range(min(MEASURED, len(data))):
        row = data[number]
        with refused(f"the processor cannot read {option}, row {number}"):
            tokens = prompt_inputs(processor, [with_pictures(row)])["input_ids"].shape[1]
        if tokens < min_tokens:
            raise TersorError(
                f"{option}, row {number}: the prompt has {tokens} tokens, and ZipVL reads prompts below min_tokens="
                f"{min_tokens} densely, so there is nothing to save; give longer ones, or --set min_tokens=0"
            )
        longest = max(longest, tokens)
    return longest


def with_pictures(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row with its pictures in front of the first text, as trl puts them."""
    from trl.data_utils import prepare_multimodal_messages

    messages: list[dict[str, Any]] = prepare_multimodal_messages(row["prompt"], images=list(row["images"]))
    return messages


def prompt_inputs(processor: Any, prompts: Sequence[Any], **template: Any) -> Any:
    """What a processor makes of several prompts, padded on the left; as trl does it, whose loss reads them again.

    Args:
        processor: Of the model.
        prompts: Messages with their pictures, see `with_pictures`.
        **template: Keywords of the chat template.
    """
    from trl.data_utils import apply_chat_template

    text = [apply_chat_template({"prompt": each}, processor, **template)["prompt"] for each in prompts]
    pictures = [
        [part["image"] for message in each if not isinstance(message["content"], str) for part in message["content"]
         if "image" in part]
        for each in prompts
    ]  # fmt: skip
    images: dict[str, Any] = {"images": pictures} if any(pictures) else {}
    return processor(text=text, return_tensors="pt", padding=len(prompts) > 1, padding_side="left", **images)


def _lines(path: Path, option: str) -> Iterable[tuple[int, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TersorError(f"{option} {path} is not UTF-8 text; write one JSON object a line") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError):
            raise TersorError(f"{option} {path}, line {number} is no JSON; write one object a line") from None


def _row(row: Any, where: str, folder: Path | None) -> dict[str, Any]:
    """One question as `questions` takes it; pictures of a file are looked for in ``folder`` and opened once."""
    if not isinstance(row, Mapping):
        raise TersorError(f"{where} is no object; write question, answer and image")
    asked = row.get("prompt", row.get("question"))
    if isinstance(asked, str) and asked.strip():
        asked = [{"role": "user", "content": asked}]
    if not (isinstance(asked, list) and asked and all(isinstance(each, Mapping) and "role" in each for each in asked)):
        raise TersorError(f"{where} has no 'question' (text) or 'prompt' (messages)")
    if (answer := _answer(row.get("answer"))) is None:
        raise TersorError(f"{where} has no 'answer': a text, a number, or a list of texts that all are right")
    images = row.get("images", row.get("image"))
    images = [] if images is None else images if isinstance(images, list) else [images]
    if folder is not None:
        images = [_picture(each, where, folder) for each in images]
    return {"prompt": asked, "images": images, "answer": answer}


def _answer(given: Any) -> list[str] | None:
    answers = given if isinstance(given, list) else [given]
    if not answers or not all(isinstance(each, (str, int, float)) and str(each).strip() for each in answers):
        return None
    return [str(each) for each in answers]


def _picture(name: Any, where: str, folder: Path) -> str:
    if not isinstance(name, str):
        raise TersorError(f"{where}: 'image' must name a file, 'images' a list of files")
    file = folder / name
    if not file.is_file():
        raise TersorError(f"{where}: no such picture: {file}")
    with opened(file, option=f"{where}:") as picture:
        picture.verify()
    return str(file)
