"""Training manifests, split by film into training and validation parts."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mask2dit.curation.caption import Captions
from mask2dit.curation.config import CurationConfig
from mask2dit.curation.review import Decision
from mask2dit.curation.store import Dropped, Entry
from mask2dit.curation.write import Clip
from mask2dit.data.clips import required_frames
from mask2dit.data.config import DataConfig
from mask2dit.data.manifests import read_manifest
from mask2dit.files import check_writable, write_text
from mask2dit.hashing import digest

CSV_FIELDS = ("fps", "width", "height", "caption", "path", "num_frame")
RANGE_FIELDS = ("start", "end", "crop")


def export(
    folder: Path,
    config: CurationConfig,
    clips: Mapping[str, Clip],
    captions: Sequence[Captions],
    decisions: Mapping[str, Decision],
    families: Mapping[str, str] | None = None,
) -> tuple[dict[str, int], list[Entry]]:
    """Writes `sft.json` and `pretrain.csv`, and the same for validation. A manifest without rows is not written; if it is
    for validation, an earlier run's is removed.

    Args:
        families: one name for all films that share near-identical clips, by film. Such films are in the same part.

    Returns:
        The number of rows per manifest, and the captions, with `Dropped` in place of those that a person dropped.

    Raises:
        OSError: if they cannot be written.
    """
    target = Path(config.export.folder)
    check_writable(target)
    sft: dict[bool, list] = {False: [], True: []}
    pretrain: dict[bool, list] = {False: [], True: []}
    results: list[Entry] = []
    data = DataConfig(kind="pretrain", num_frames=config.num_frames, max_stride=config.max_stride)
    for entry in captions:
        decision = decisions.get(entry.key)
        if decision and decision.drop:
            why = "dropped on the review page"
            results.append(Dropped(id=entry.id, source=entry.source, rule="review", why=why))
            continue
        texts = decision.captions if decision else entry.captions
        of_entry = [clips[name] for name in entry.clips]
        is_validation = in_validation((families or {}).get(entry.source, entry.source), config.export.validation_share)
        paths = [_relative_path(folder, clip, target) for clip in of_entry]
        if len(of_entry) > 1:
            values = [_sft_scene(*scene) for scene in zip(of_entry, texts, paths)]
            sft[is_validation].append({"prefix": entry.id, "values": values})
        pretrain[is_validation] += [
            [clip.fps, clip.width, clip.height, text, path, clip.num_frames, *_range(clip)]
            for clip, text, path in zip(of_entry, texts, paths)
            if clip.num_frames >= required_frames(data)
        ]
        results.append(entry)

    rows = {}
    for is_validation, suffix in ((False, ""), (True, "_validation")):
        for name, kind, found in (
            (f"sft{suffix}.json", "finetune", sft[is_validation]),
            (f"pretrain{suffix}.csv", "pretrain", pretrain[is_validation]),
        ):
            rows[name] = len(found)
            if found:
                write_text(target / name, _json(found) if kind == "finetune" else _csv(found))
                read_manifest(DataConfig(kind=kind, manifest=str(target / name)))
            elif is_validation:
                # An earlier run's may list films that are now used for training.
                (target / name).unlink(missing_ok=True)
    return rows, results


def in_validation(source: str, share: float) -> bool:
    """True if a film is for validation. Depends on its name alone."""
    return int(digest(["validation", source]), 16) < share * 16**16


def _json(rows: list[dict]) -> str:
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def _csv(rows: list[list]) -> str:
    with io.StringIO(newline="") as file:
        fields = (*CSV_FIELDS, *RANGE_FIELDS)[: max(map(len, rows))]
        csv.writer(file).writerows([fields, *rows])
        return file.getvalue()


def _relative_path(folder: Path, clip: Clip, target: Path) -> str:
    if clip.is_range:  # the path may leave the output folder, which may be a link
        return os.path.relpath(os.path.realpath(folder / clip.path), os.path.realpath(target))
    return os.path.relpath(folder / clip.path, target)


def _range(clip: Clip) -> list:
    """The values of `RANGE_FIELDS`; none for a clip with a file of its own."""
    return [clip.start, clip.stop, " ".join(map(str, clip.crop))] if clip.is_range else []


def _sft_scene(clip: Clip, caption: str, path: str) -> dict:
    return {
        "vid": clip.id,
        "width": clip.width,
        "height": clip.height,
        "duration": round(clip.num_frames / clip.fps, 4),
        "fps": clip.fps,
        "url": path,
        "caption": caption,
        **({"start": clip.start, "end": clip.stop, "crop": clip.crop} if clip.is_range else {}),
    }
