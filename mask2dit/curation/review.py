"""The review page, on which a person edits or drops captioned groups, and the reader of its decisions.

The page is a file and needs no server. It saves `decisions.json`, which belongs in the same folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from mask2dit.curation.answers import check_captions
from mask2dit.curation.caption import Captions
from mask2dit.curation.doubts import DoubtfulCut
from mask2dit.curation.group import Group
from mask2dit.curation.write import Clip
from mask2dit.files import atomic_path, write_text
from mask2dit.hashing import digest
from mask2dit.reporting.pages import render
from mask2dit.texts import parse_json, read_text

DECISIONS = "decisions.json"
POSTER_SIZE = (480, 320)
MAX_DOUBTS = 200


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A person's decision about the captions of a group."""

    id: str
    drop: bool
    actors: dict[str, str]
    captions: list[str]


def write_review(
    folder: Path,
    groups: Mapping[str, Group],
    clips: Mapping[str, Clip],
    captions: Sequence[Captions],
    cosines: Mapping[str, Sequence[float]],
    decisions: Mapping[str, Decision],
    flag_below: float,
    doubts: Sequence[DoubtfulCut] = (),
) -> Path:
    """Writes `review.html`, and a picture of every clip in `posters`.

    Args:
        folder: the output folder of the run.
        groups: groups by id.
        clips: clips by id.
        captions: captions to show.
        cosines: cosines of captions with their clips, by the captions' id, as far as known.
        decisions: earlier decisions, by the captions' key. The page keeps those about other captions.
        flag_below: cosine below which captions are flagged.
        doubts: cuts to look at, of which the page shows the first `MAX_DOUBTS`.
    """
    (folder / "posters").mkdir(exist_ok=True)
    entries = []
    for entry in captions:
        of_captions = cosines.get(entry.id)
        decision = decisions.get(entry.key)
        of_group = [clips[name] for name in entry.clips]
        entries.append(
            {
                "key": entry.key,
                "id": entry.id,
                "clips": [
                    {
                        "path": clip.path,
                        "range": [clip.start / clip.fps, clip.stop / clip.fps] if clip.is_range else None,
                        "poster": _poster(folder, clip, clip.num_frames // 2),
                        "info": f"{clip.start}-{clip.stop}, {clip.num_frames / clip.fps:.1f} s, {clip.width}x{clip.height}",
                        "cosine": of_captions and of_captions[i],
                    }
                    for i, clip in enumerate(of_group)
                ],
                "adjacent": [groups[entry.id].similarity[i][i + 1] for i in range(len(of_group) - 1)],
                "written": [entry.actors, entry.captions],
                "flagged": bool(of_captions) and min(of_captions) < flag_below,
                "actors": decision.actors if decision else entry.actors,
                "captions": decision.captions if decision else entry.captions,
                "decision": None if decision is None else "drop" if decision.drop else "keep",
            }
        )
    records = {key: asdict(decision) for key, decision in decisions.items()}
    shown = {entry.key for entry in captions}
    data = {
        "entries": entries,
        "others": {key: record for key, record in records.items() if key not in shown},
        "read": digest(records),
    }
    page = folder / "review.html"
    shown_doubts = [
        {
            "source": doubt.source,
            "why": doubt.why,
            "posters": [_poster(folder, clips[name], frame) for name, frame in doubt.frames],
        }
        for doubt in doubts[:MAX_DOUBTS]
    ]
    text = render("review.html", title="Review of captions", data=data, doubts=shown_doubts, num_doubts=len(doubts))
    write_text(page, text)
    return page


def read_decisions(path: Path, captions: Sequence[Captions], max_words: int) -> dict[str, Decision]:
    """All decisions, by the captions' key. Those about other captions are kept for when their settings return.

    Raises:
        ValueError: if the file is damaged, or edited captions are not in the method's format; the message lists them.
    """
    if not path.is_file():
        return {}
    try:
        records = parse_json(read_text(path, "file of decisions"))
        found = {key: Decision(**record) for key, record in records.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what the review page saves ({error}): save it again") from error
    current = {entry.key: entry for entry in captions}
    faults = []
    for key, decision in found.items():
        if decision.drop or key not in current:
            continue
        try:
            if len(decision.captions) != len(current[key].clips):
                raise ValueError(f"there are {len(current[key].clips)} clips, but {len(decision.captions)} captions")
            check_captions(decision.actors, decision.captions, max_words)
        except ValueError as fault:
            faults.append(f"{decision.id}: {fault}")
    if faults:
        raise ValueError(f"{path} holds captions that cannot be used: {'; '.join(faults)}")
    return found


def _poster(folder: Path, clip: Clip, frame: int) -> str:
    """Saves a frame of a clip. Returns its path relative to the output folder."""
    path = folder / "posters" / f"{digest([clip.key, frame])}.jpg"
    if not path.exists():
        reader = clip.open(folder)
        image = Image.fromarray(reader.read([min(frame, reader.num_frames - 1)])[0].numpy())
        image.thumbnail(POSTER_SIZE)
        with atomic_path(path) as temporary:
            image.save(temporary, quality=85)
    return path.relative_to(folder).as_posix()
