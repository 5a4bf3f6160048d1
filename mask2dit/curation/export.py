"""The manifests of training, in training and validation parts by film, with a card that says how they were made."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mask2dit.curation.caption import Captions
from mask2dit.curation.config import CurationConfig
from mask2dit.curation.review import Decision
from mask2dit.curation.store import Dropped, Entry, digest
from mask2dit.curation.write import Clip
from mask2dit.data.clips import required_frames
from mask2dit.data.config import DataConfig
from mask2dit.data.manifests import read_manifest
from mask2dit.video.writing import check_writable, write_text

CSV_FIELDS = ("fps", "width", "height", "caption", "path", "num_frame")


def export(
    folder: Path,
    config: CurationConfig,
    clips: Mapping[str, Clip],
    captions: Sequence[Captions],
    decisions: Mapping[str, Decision],
) -> tuple[dict[str, int], list[Entry]]:
    """Writes `sft.json` and `pretrain.csv`, and the same for validation. A manifest without rows is not written.

    Returns:
        The number of rows of each manifest, and the captions, of which some are `Dropped` by a person.

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
        is_validation = in_validation(entry.source, config.export.validation_share)
        paths = [os.path.relpath(folder / clip.path, target) for clip in of_entry]
        if len(of_entry) > 1:
            values = [_sft_scene(*scene) for scene in zip(of_entry, texts, paths)]
            sft[is_validation].append({"prefix": entry.id, "values": values})
        pretrain[is_validation] += [
            [clip.fps, clip.width, clip.height, text, path, clip.num_frames]
            for clip, text, path in zip(of_entry, texts, paths)
            if clip.num_frames >= required_frames(data)
        ]
        results.append(entry)

    rows = {}
    for is_validation, suffix in ((False, ""), (True, "_validation")):
        name = f"sft{suffix}.json"
        rows[name] = len(sft[is_validation])
        if rows[name]:
            write_text(target / name, json.dumps(sft[is_validation], indent=2, ensure_ascii=False) + "\n")
        name = f"pretrain{suffix}.csv"
        rows[name] = len(pretrain[is_validation])
        if rows[name]:
            with io.StringIO(newline="") as file:
                csv.writer(file).writerows([CSV_FIELDS, *pretrain[is_validation]])
                write_text(target / name, file.getvalue())
    for name in (name for name, count in rows.items() if count):
        kind = "finetune" if name.startswith("sft") else "pretrain"
        read_manifest(DataConfig(kind=kind, manifest=str(target / name)))
    return rows, results


def in_validation(source: str, share: float) -> bool:
    """Whether a film is for validation: a function of its name alone."""
    return int(digest(["validation", source]), 16) < share * 16**16


def _sft_scene(clip: Clip, caption: str, path: str) -> dict:
    return {
        "vid": clip.id,
        "width": clip.width,
        "height": clip.height,
        "duration": round(clip.num_frames / clip.fps, 4),
        "fps": clip.fps,
        "url": path,
        "caption": caption,
    }
