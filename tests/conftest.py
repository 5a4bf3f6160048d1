import hashlib
import json
import multiprocessing
import pickle
import re
import shutil
import threading
from contextlib import nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler
from huggingface_hub import constants
from safetensors import safe_open
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from mask2dit import Mask2DiTPipeline, Mask2DiTTransformer3DModel
from mask2dit.encoders.untrained import build_untrained_viclip
from mask2dit.engine.share import Runner, in_batches
from mask2dit.models import attention
from mask2dit.pipelines.untrained import build_untrained_model

# Tiny models lose more by waiting for a second thread than they gain by it, most of all on a busy machine.
torch.set_num_threads(1)

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 24,
    "num_layers": 2,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 6,
    "use_rotary_positional_embeddings": True,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}
TINY_ENCODER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Parity:
    """A file of numbers from the published implementation."""

    def __init__(self, path: Path):
        with safe_open(path, framework="pt") as file:
            self.settings = file.metadata()
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def transformer(self) -> Mask2DiTTransformer3DModel:
        config = json.loads(self.settings["config"])
        model = Mask2DiTTransformer3DModel(**config, mask_variant=self.settings["mask_variant"])
        weights = {k.removeprefix("model."): v for k, v in self.tensors.items() if k.startswith("model.")}
        model.load_state_dict(weights)
        return model.eval()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors


@pytest.fixture
def parity():
    return lambda name: Parity(Path(__file__).parent / "parity" / f"{name}.safetensors")


@pytest.fixture
def make_transformer():
    """A tiny random transformer; keywords change its configuration."""

    def make(**config) -> Mask2DiTTransformer3DModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Mask2DiTTransformer3DModel(**{**TINY, **config}).eval()

    return make


@pytest.fixture(scope="session")
def tiny_vae() -> AutoencoderKLCogVideoX:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=0.7,
        ).eval()


@pytest.fixture
def scheduler_config() -> dict:
    """CogVideoX-5B's noise schedule."""
    return SCHEDULER


@pytest.fixture
def make_pipeline(make_transformer, tiny_vae):
    """A pipeline of tiny random models without text encoder: prompts are given as embeddings."""

    def make(transformer=None, scheduler=None, **config) -> Mask2DiTPipeline:
        pipe = Mask2DiTPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=tiny_vae,
            transformer=transformer or make_transformer(**config),
            scheduler=scheduler or CogVideoXDDIMScheduler(**SCHEDULER),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def random_inputs():
    """Latents, text embeddings and timesteps for tiny transformers: (B, S*F, 4, 8, 12), (B, S*6, 24), (B, S)."""

    def make(batch_size=2, num_scenes=3, num_frames=9, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return (
            torch.randn(batch_size, num_frames, 4, 8, 12, generator=generator),
            torch.randn(batch_size, num_scenes * 6, 24, generator=generator),
            torch.randint(1, 1000, (batch_size, num_scenes), generator=generator),
        )

    return make


class FrozenContext:
    """An oracle of the context cache: computes all scenes, but takes the keys and values of given scenes from the last
    refreshing call of the transformer.

    Args:
        generated: (S,) bools.
        refresh: the first and every k-th call of the transformer refreshes.
        num_layers: layers of the transformer.
    """

    def __init__(self, generated, refresh, num_layers):
        self.generated, self.refresh, self.num_layers = generated, refresh, num_layers
        self.kept, self.calls = {}, 0
        self.grouped_attention = attention.grouped_attention

    def __call__(self, query, key, value, layout, variant, backend=None, given=None):
        call, layer = divmod(self.calls, self.num_layers)
        self.calls += 1
        if call % self.refresh == 0:
            self.kept[layer] = (key, value)
        is_given = torch.zeros(layout.length, 1, 1, dtype=torch.bool)
        for (start, stop), new in zip((*layout.text_spans, *layout.video_spans), self.generated * 2):
            is_given[start:stop] = not new
        key, value = (torch.where(is_given, kept, new) for kept, new in zip(self.kept[layer], (key, value)))
        return self.grouped_attention(query, key, value, layout, variant, backend)


@pytest.fixture
def freeze_context(monkeypatch):
    """Puts a `FrozenContext` in the place of attention, until the end of the test."""

    def freeze(generated, refresh, num_layers=TINY["num_layers"]):
        monkeypatch.setattr(attention, "grouped_attention", FrozenContext(generated, refresh, num_layers))

    return freeze


# What a forked process runs, to become what a shell or torchrun would have started.
PROGRAM = """
import os, runpy, sys, torch
torch.set_num_threads(1)
os.environ.update(environment)
os.chdir(root)
os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
exec(before)
sys.argv = command
run = runpy.run_path if command[0].endswith(".py") else runpy.run_module
run(command[0], run_name="__main__")
"""


@pytest.fixture
def fork(tmp_path):
    """Starts a module or script in a process that has imported what takes seconds to import, with its arguments and changes
    of the environment. `before` is code that runs first. Returns the process, whose `errors` reads its stderr."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mask2dit.training.run", "deepspeed"])
    started = []

    def start(command: list[str], environment: dict[str, str], before: str = "") -> multiprocessing.Process:
        log = tmp_path / f"stderr-{len(started)}"
        log.touch()
        values = {"command": command, "environment": environment, "before": before, "log": str(log)}
        root = str(Path(__file__).parents[1])
        process = context.Process(target=exec, args=(PROGRAM, {**values, "root": root}))
        process.start()
        process.errors = log.read_text
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def run_checks(fork, tmp_path):
    """Runs checks of `processes.py`, all but the slow ones if none is named, on several processes. Returns the largest
    difference of each, or the traceback of its error."""

    def run(num_processes: int, *names: str) -> dict[str, float | str]:
        script = str(Path(__file__).with_name("processes.py"))
        ranks = [[script, str(tmp_path), str(rank), str(num_processes), *names] for rank in range(num_processes)]
        processes = [fork(command, {}) for command in ranks]
        for process in processes:
            process.join()
        assert not any(process.exitcode for process in processes), "\n".join(p.errors() for p in processes)
        return json.loads((tmp_path / "results.json").read_text())

    return run


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """The complete small folder that the repository builds."""
    return build_untrained_model(tmp_path_factory.mktemp("models") / "small")


@dataclass
class Hub:
    """A hub with one model, and what was asked of it."""

    folder: Path
    cache: Path
    name: str = "someone/small"
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    url: str = ""
    refuses: tuple[int, str] | None = None
    """Status and error code of every answer about the model."""
    gated: bool = False
    """True: files are refused, while the model's page can be read, as for a licence that was not accepted."""
    fetched: list[str] = field(default_factory=list)
    """Files that were downloaded."""

    def fetched_weights(self) -> list[str]:
        """The weights among the downloaded files."""
        return sorted(name for name in self.fetched if self.is_weights(name))

    @staticmethod
    def is_weights(name: str) -> bool:
        return name.endswith((".safetensors", ".bin"))

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def sizes(self, name: str) -> dict:
        content = (self.folder / name).read_bytes()
        entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if self.is_weights(name):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry


def hub_handler(hub: Hub) -> type:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def answer(self):
            path = self.path.partition("?")[0]
            page = re.fullmatch(rf"/api/models/{hub.name}(?:/(revision|tree)/([^/]+))?", path)
            file = re.fullmatch(rf"/{hub.name}/resolve/[^/]+/(.+)", path)
            if hub.refuses:
                self.refuse(*hub.refuses)
            elif page is None and file is None:
                self.refuse(404, "RepoNotFound")
            elif page and page[2] not in (None, "main", "v1", hub.commit):
                self.refuse(404, "RevisionNotFound")
            elif page and page[1] == "tree":
                self.send([hub.sizes(name) for name in hub.files()])
            elif page:
                self.send(
                    {"id": hub.name, "sha": hub.commit, "siblings": [{"rfilename": name} for name in hub.files()]}
                )
            elif hub.gated:
                self.refuse(403, "GatedRepo")
            else:
                self.send_file(file[1])

        def send(self, content, **headers):
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(200)
            headers = {"Content-Length": str(len(content)), "X-Repo-Commit": hub.commit, **headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def send_file(self, name):
            if self.command == "GET":
                hub.fetched.append(name)
            entry = hub.sizes(name)
            self.send((hub.folder / name).read_bytes(), ETag=f'"{entry.get("lfs", entry)["oid"]}"')

        def refuse(self, status, code):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    return Handler


@pytest.fixture
def hub(small_model, tmp_path, monkeypatch):
    """A hub that serves the small model, with an empty cache."""
    shutil.copytree(small_model, tmp_path / "served")
    hub = Hub(tmp_path / "served", tmp_path / "cache")
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub_handler(hub))
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    # Read from the environment when the library is imported.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    address = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants._HF_DEFAULT_ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
    monkeypatch.chdir(tmp_path)  # where no folder has the model's name
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_connection(hub, monkeypatch):
    """Nothing listens at the hub's address from when this is called."""
    return lambda: monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def stored_bytes():
    """Counts the bytes of a module's weights, in the parts that torchao stores quantized ones in."""

    def count(module) -> int:
        total = 0
        for tensor in [*module.parameters(), *module.buffers()]:
            parts = [getattr(tensor, name, None) for name in ("qdata", "scale")]
            total += sum(part.nbytes for part in parts if part is not None) if parts[0] is not None else tensor.nbytes
        return total

    return count


@pytest.fixture
def small_pipeline(small_model) -> Mask2DiTPipeline:
    pipe = Mask2DiTPipeline.from_pretrained(small_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def clip_folder(tmp_path):
    """A whole CLIP, as published folders hold it."""
    torch.manual_seed(0)
    vision = {**TINY_ENCODER, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config={**TINY_ENCODER, "vocab_size": 10}, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    return str(tmp_path / "clip")


@pytest.fixture
def dino_folder(tmp_path):
    torch.manual_seed(0)
    ViTModel(ViTConfig(**TINY_ENCODER, image_size=32, patch_size=16)).save_pretrained(tmp_path / "dino")
    return str(tmp_path / "dino")


def completion(content: object, **changes) -> dict:
    """An answer of an OpenAI-compatible endpoint; keywords change its fields."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": usage,
        **changes,
    }


@pytest.fixture
def make_completion():
    return completion


@pytest.fixture
def real_answers():
    """Answers that real endpoints give, as functions of a text that would be right: those that hold it, those that may pass,
    those of an address that speaks another protocol, and those that refuse the content."""
    taken = {
        "plain": completion,
        "fenced": lambda text: completion(f"```json\n{text}\n```"),
        "between sentences": lambda text: completion(f"Here it is:\n{text}\nAnything else?"),
        "after reasoning": lambda text: completion(f"<think>As asked, {{'actors': [...]}}.</think>\n{text}"),
        "before braces": lambda text: completion(f"{text}\nI kept the form {{name (appearance)}}."),
        "in parts": lambda text: completion([{"type": "text", "text": text}]),
        "uncounted": lambda text: completion(text, usage=None),
    }
    return {
        "taken": {name: lambda text, make=make: (200, make(text), {}) for name, make in taken.items()},
        "may pass": {
            "error in 200": lambda text: (200, {"error": {"message": "rate limited upstream", "code": 429}}, {}),
            "empty": lambda text: (200, "", {}),
            "overloaded": lambda text: (503, {"error": {"message": "overloaded"}}, {}),
        },
        "unusable": {
            "page": lambda text: (200, "<html>Welcome</html>", {"Content-Type": "text/html"}),
            "list": lambda text: (200, [], {}),
            "no key": lambda text: (401, {"error": {"message": "no key"}}, {}),
        },
        "refused": {
            "filter": lambda text: (400, {"error": {"message": "by policy", "code": "content_filter"}}, {}),
        },
    }


@pytest.fixture
def chat_server():
    """Stands in for an OpenAI-compatible endpoint: answers in order, then by "no more", and keeps what it was asked.

    An answer is the text of a completion; or the status, what the body holds (a text as it is, anything else as JSON) and
    headers.
    """
    servers = []

    def start(answers: list, status: int = 200):
        asked = []
        answers = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = answers.pop(0) if answers else "no more"
                if isinstance(answer, str):
                    answer = (status, completion(answer), {})
                code, body, headers = answer
                content = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(code)
                headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # soon shut down
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class PicklingEngine:
    """Runs stages as workers do, in this process: everything passes through pickle."""

    def run(self, name, process, items, workers):
        def passed(value):
            return pickle.loads(pickle.dumps(value))

        runner = passed(Runner(process, workers.load))
        for batch in [None, *in_batches(items, workers.batch)]:
            results, error = passed(runner.load() if batch is None else runner.run(passed(batch)))
            yield from results
            if error:
                raise error


@pytest.fixture
def pickling_engine():
    """Stands in for `open_engine` where the start of processes would take too long."""
    return lambda config: nullcontext(PicklingEngine())


@pytest.fixture(scope="session")
def ray_cluster():
    """A real Ray cluster of this machine with two CPUs, to which the tests' process is connected. Takes seconds to start."""
    ray = pytest.importorskip("ray", reason="pip install mask2dit[cluster]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
        yield ray
        ray.shutdown()


@pytest.fixture(scope="session")
def tiny_viclip(tmp_path_factory) -> Path:
    return build_untrained_viclip(tmp_path_factory.mktemp("viclip") / "untrained.safetensors")
