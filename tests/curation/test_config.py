import pytest

from mask2dit.config import load_config
from mask2dit.curation.config import CurationConfig


@pytest.mark.parametrize(
    "override, message",
    [
        ("stages=[probe,cut]", "stages has to hold probe, .*, but holds 'cut'"),
        ("stages=[]", "stages is empty"),
        ("shard=2/2", "shard has to be i/n"),
        ("num_frames=0", "num_frames=0 has to be at least 1"),
        ("split.detectors=[guess]", "has to hold transnet, content, adaptive, fades or module:function, not 'guess'"),
        ("split.detectors=[]", "split.detectors is empty"),
        ("split.force_cut_above=3", "split.force_cut_length=5.0 has to be between 0 and split.force_cut_above=3.0"),
        ("split.content_threshold=0", "split.content_threshold=0.0 has to be more than 0"),
        ("split.adaptive_threshold=-3", "split.adaptive_threshold=-3.0 has to be more than 0"),
        ("split.fade_threshold=300", "split.fade_threshold=300"),
        ("write.trim_frames=-1", "write.trim_frames=-1 has to be at least 0"),
        ("score.clip=models/clip", "score.clip and score.aesthetic_head belong together"),
        ("filter.min_motion=1", "filter.min_motion needs score.motion=true"),
        ("filter.max_text=0.1", "filter.max_text needs score.text=true"),
        ("filter.max_text=5", "filter.max_text=5"),
        ("filter.max_subtitles=-0.1", "filter.max_subtitles=-0.1"),
        ("filter.max_shake=-1", "filter.max_shake=-1.0 has to be at least 0"),
        ("filter.min_short_side=-480", "filter.min_short_side=-480 has to be at least 0"),
        ("filter.min_aesthetic=.nan", "filter.min_aesthetic=nan"),
        ("verify.flag_below=1.5", "verify.flag_below=1.5"),
        ("group.threshold=0.99", "group.threshold=0.99 has to be between -1 and group.ceiling=0.98"),
        ("group.ceiling=1.5", "group.ceiling=1.5, and that at 1 or below"),
        ("group.max_gap=-1", "group.max_gap=-1.0 has to be at least 0"),
        ("caption.base_url=http://me:secret@host/v1", "caption.base_url holds a user or a password"),
        ("caption.api_key_env=sk-secret", "has to be the name of an environment variable, not the key itself"),
        ("group.num_scenes=1", "group.num_scenes=1 has to be at least 2"),
        ("caption.backend=vllm", "caption.backend has to be one of openai, transformers, stand_in"),
        ("caption.max_cost=5", "caption.max_cost needs caption.price_input and caption.price_output"),
        ("caption.price_input=-1", "caption.price_input=-1.0 has to be at least 0"),
        ("caption.max_new_tokens=0", "caption.max_new_tokens=0 has to be at least 1"),
        ("caption.tokens_per_image=-400", "caption.tokens_per_image=-400 has to be at least 0"),
        ("caption.dtype=half", "caption.dtype has to be one of float32, bfloat16, float16, but is 'half'"),
        ("caption.timeout=0", "caption.timeout=0.0 has to be more than 0"),
        ("export.validation_share=1", "has to be at least 0 and less than 1"),
        ("embed.viclip.weights=null", "embed.viclip.weights has to name"),
    ],
)
def test_a_mistake_is_told_by_its_key(override, message):
    with pytest.raises(ValueError, match=message) as error:
        load_config(CurationConfig, None, [override])
    assert "secret" not in str(error.value)


def test_what_a_captioner_lacks_is_named():
    assert load_config(CurationConfig, None, []).caption.missing == "caption.base_url and caption.model"
    assert load_config(CurationConfig, None, ["caption.backend=transformers"]).caption.missing == "caption.model"
    assert load_config(CurationConfig, None, ["caption.backend=stand_in"]).caption.missing is None
