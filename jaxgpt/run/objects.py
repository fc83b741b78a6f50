"""Where a run's checkpoints lie in an object store, and how they get there: TensorStore alone, no Orbax.

`checkpoints/<step>/state-<token>/` is one OCDBT database of zarr arrays, as Orbax lays them out on a disk. Each process
writes what its own devices hold; several write a database each, `ocdbt.process_<n>/` within, which process 0 then
joins by reference. `record.json` beside it comes last and names the database: until then there is no checkpoint. Every
save has its own token, so that what a writer taken for dead still sends is never mixed with another's.
"""

import contextlib
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from jax.experimental import multihost_utils

from jaxgpt import from_json, store
from jaxgpt.run.processes import joined
from jaxgpt.store import StorePath

GROUP_BYTES = 2**28  # of arrays that are sent together: no object is larger but for a larger array
WAIT_S = 3600  # for the slowest process


class Objects:
    """The checkpoints of a run whose folder is in a store. Methods as those of checkpoint.Disk."""

    may_be_slow, READ_AHEAD = True, GROUP_BYTES

    def __init__(self, folder: StorePath, sealed: Callable[[dict], bytes]):
        self.folder, self._sealed = folder, sealed
        # of the save under way: where it goes; each array's dtype, shape and shard's shape; what is left to send of it
        self._state = folder
        self._kinds: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {}
        self._blocks: dict[str, list[tuple[Any, np.ndarray]]] = {}

    # --- what is there ---

    def names(self) -> list[str]:
        """Of those whose record is there."""
        return [
            name for name, _, rest in (key.partition("/") for key in self.folder.objects()) if rest == "record.json"
        ]

    def record(self, step: int) -> bytes:
        return (self.folder / f"{step}/record.json").read_bytes()

    def files(self, step: int, record: dict) -> dict[str, Any]:
        """As recorded, those that are there: stores list names, and digests prove the rest."""
        there = (self.folder / str(step)).objects() if record["files"] else []
        return {name: record["files"].get(name) for name in there}

    def open(self, step: int, record: dict, names: Iterable[str]) -> dict[str, ts.TensorStore]:
        return _open(self.folder / f"{step}/{record.get('state', 'state')}", names)

    # --- a save ---

    def tidy(self) -> None:
        """Removes what no record names: of killed saves and removals. What is no step's is not ours, and stays."""
        keys, keep = [key for key in self.folder.objects() if key.partition("/")[0].isdecimal()], set()
        for step in {key.partition("/")[0] for key in keys if key.partition("/")[2] == "record.json"}:
            try:
                keep.add(f"{step}/{from_json(self.record(int(step))).get('state', 'state')}/")
            except (ValueError, AttributeError):  # damaged: passed over when it is read, and told of
                keep.add(f"{step}/")
        stale = [
            key
            for key in keys
            if not key.endswith("/record.json") and not any(key.startswith(prefix) for prefix in keep)
        ]
        self.folder.remove_all(stale)

    def make_room(self, step: int, need: int) -> None:
        """A store has room until it has none."""

    def write(self, step: int, arrays: dict[str, jax.Array]) -> None:
        """Copies what this process's devices hold to the host, for `finish` to send."""
        self._state = self.folder / f"{step}/state-{_token()}"
        shards = {name: [s for s in x.addressable_shards if s.replica_id == 0] for name, x in arrays.items()}
        for shard in (shard for each in shards.values() for shard in each):
            shard.data.copy_to_host_async()
        self._blocks = {name: [(s.index, np.array(s.data)) for s in each] for name, each in shards.items()}
        self._kinds = {name: (x.dtype.name, x.shape, x.sharding.shard_shape(x.shape)) for name, x in arrays.items()}

    def finish(self, error: Exception | None) -> None:
        """Sends what `write` took, and waits for the other processes. Raises OSError unless all could."""
        several, failure = jax.process_count() > 1, "" if error is None else str(error) or type(error).__name__
        mine = self._state / f"ocdbt.process_{jax.process_index()}" if several else self._state
        try:
            for names in () if error else self._groups():
                self._send(mine, names)
        except Exception as raised:  # whatever it is, the others are told
            failure = str(store.os_error(raised, self._state).strerror)
        self._blocks = {}
        if several:
            self._tell("written", failure)
            failure = failure or next(filter(None, self._told("written")), "")
        if failure:
            raise OSError(failure)
        if several and jax.process_index() == 0:
            self._join()

    def part(self, done: bool) -> None:
        """The others wait for process 0 here, and not in a collective, which waits less long."""
        if jax.process_count() > 1:
            self._tell("parted", "")
            if jax.process_index():
                self._told("parted", [0])

    def _tell(self, what: str, text: str) -> None:
        joined.client.key_value_set(f"jaxgpt/{what}/{self._state.name}/{jax.process_index()}", text or " ")

    def _told(self, what: str, processes: Iterable[int] = ()) -> list[str]:
        """What the processes have to say, in words."""
        key, found = f"jaxgpt/{what}/{self._state.name}", []
        for n in processes or range(jax.process_count()):
            try:
                text = joined.client.blocking_key_value_get(f"{key}/{n}", 1000 * WAIT_S).strip()
                found.append(text and f"process {n}: {text}")
            except jax.errors.JaxRuntimeError:
                found.append(f"process {n} was not done in {WAIT_S} s")
        return found

    def _groups(self) -> Iterator[list[str]]:
        """The arrays' names, those of GROUP_BYTES together."""
        group, size = [], 0
        for name, blocks in self._blocks.items():
            if not blocks:
                continue
            group.append(name)
            size += sum(block.nbytes for _, block in blocks)
            if size >= GROUP_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _send(self, to: StorePath, names: list[str]) -> None:
        """Writes arrays in one transaction: an object for the data, and the database's index."""
        context, transaction, writing = store.context(), ts.Transaction(), []
        for name in names:
            dtype, shape, shard = self._kinds[name]
            metadata = {"compressor": None, "chunks": [max(1, n) for n in shard], "shape": list(shape)}
            how = {"driver": "zarr", "dtype": dtype, "metadata": metadata}
            kvstore = {**_database(to), "path": f"{name}/"}
            where = {"create": True, "open": True, "transaction": transaction, "context": context}
            array = ts.open({**how, "kvstore": kvstore}, **where).result()
            writing += [array[index].write(block) for index, block in self._blocks[name]]
        for each in writing:
            each.result()
        transaction.commit_async().result()
        for name in names:
            self._blocks[name] = []

    def _join(self) -> None:
        """Makes one database of the processes' own, whose data stay where they are."""
        context = store.context()
        whole = ts.KvStore.open(_database(self._state), context=context).result()
        for n in range(jax.process_count()):
            part = ts.KvStore.open(_database(self._state / f"ocdbt.process_{n}"), context=context).result()
            part.experimental_copy_range_to(whole).result()

    def written(self, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Read ahead: a store takes long to answer, and answers many at once."""
        ahead, size = deque(), 0
        for name, array in _open(self._state, names).items():
            ahead.append((name, array.read(), array.size * array.dtype.numpy_dtype.itemsize))
            size += ahead[-1][2]
            while size > GROUP_BYTES:
                name, future, bytes_ = ahead.popleft()
                size -= bytes_
                yield name, np.asarray(future.result())
        yield from ((name, np.asarray(future.result())) for name, future, _ in ahead)

    def commit(self, step: int, record: dict, check: Callable[[], None]) -> None:
        check()
        self.rewrite(step, {**record, "files": {}, "state": self._state.name})
        with contextlib.suppress(OSError):  # else after the next one
            check()
            self.tidy()  # of a checkpoint of this step that was damaged, and passed over

    def rewrite(self, step: int, record: dict) -> None:
        """In place of the record that is there now: if it is another by then, another run writes here."""
        path = self.folder / f"{step}/record.json"
        try:
            before = path.get()[1]
        except FileNotFoundError:
            before = store.ABSENT
        if path.put(self._sealed(record), replacing=before) is None:
            raise OSError(f"another run wrote {path} meanwhile")

    def remove(self, step: int) -> None:
        """The record first: a removal cut short must not leave half a checkpoint."""
        folder = self.folder / str(step)
        (folder / "record.json").unlink()
        folder.remove_all(folder.objects())

    def abandon(self, step: int) -> None:
        record = self.folder / f"{step}/record.json"
        with contextlib.suppress(FileNotFoundError, ValueError):  # it may be there, if the answer to its write was lost
            if from_json(record.read_bytes()).get("state") == self._state.name:
                record.unlink()
        self._state.remove_all(self._state.objects())


def _token() -> str:
    """A new name, the same on every process."""
    mine = np.frombuffer(secrets.token_bytes(8), np.uint32)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint32).tobytes().hex()


def _database(state: StorePath) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": state.spec()}


def _open(state: StorePath, names: Iterable[str]) -> dict[str, ts.TensorStore]:
    context, how = store.context(), {"driver": "zarr", "open": True, "fill_missing_data_reads": False}
    how |= {"recheck_cached_data": False, "recheck_cached_metadata": False}  # the context, its cache too, is new
    opening = {
        name: ts.open({**how, "kvstore": {**_database(state), "path": f"{name}/"}}, context=context) for name in names
    }
    return {name: future.result() for name, future in opening.items()}
