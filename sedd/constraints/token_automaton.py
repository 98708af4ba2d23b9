"""Byte automata lifted to the tokens of a vocabulary (arXiv:2505.23061, section 4).

A token leads from a state to where its bytes lead. Tokens that lead to the same state from every
state form a class, and there are far fewer classes than tokens.

The idea. The vocabulary is a trie of bytes, and each of its nodes has a column: the state that the
bytes down to the node lead to, from each state. Columns are computed level by level, from the
column of the parent and one more byte. Nodes share columns, so each distinct pair of a parent's
column and a class of bytes is computed only once. The distinct columns of the tokens are the
classes. Everything runs in NumPy, and no array of states × vocabulary is formed.
"""

import contextlib
import hashlib
import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sedd.constraints.automaton import ByteAutomaton, compile_bytes
from sedd.constraints.regex import shown
from sedd.errors import UserError
from sedd.files import write_whole

FORMAT = 1  # of cached automata; raise it when the result of compiling a pattern changes
ARRAYS = ("accepting", "class_of", "edge_source", "edge_class", "edge_target", "distance")


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """The bytes of all tokens as a trie, built once and used for any number of patterns.

    Attributes:
        size: the number of tokens.
        eos_id: the end-of-text token, or None.
        fingerprint: a hash of all tokens, for the names of cached automata.
        levels: for each depth from 1 on, the parent of each node (its index in the depth before)
            and the byte from the parent to the node.
        token: the ids of the tokens with bytes.
        node: the node at which each of them ends, counted over all depths from the root on.
    """

    size: int
    eos_id: int | None
    fingerprint: str
    levels: tuple[tuple[np.ndarray, np.ndarray], ...]
    token: np.ndarray
    node: np.ndarray

    @classmethod
    def of(cls, tokens: Sequence[bytes | None], *, eos_id: int | None = None) -> "Vocabulary":
        """Build the trie of a vocabulary.

        Args:
            tokens: the bytes of each token. Tokens without bytes and those of None, which are no
                text, are left out.
            eos_id: the end-of-text token, which is left out as well.

        Raises:
            UserError: ``eos_id`` is out of range.
        """
        if eos_id is not None and not 0 <= eos_id < len(tokens):
            raise UserError(f"eos_id must be in 0..{len(tokens) - 1}, got {eos_id}")
        digest = hashlib.sha256(f"{len(tokens)} {eos_id}".encode())
        for token in tokens:
            digest.update(b"-" if token is None else b"%d:%s" % (len(token), token))
        texts = [b"" if i == eos_id or token is None else token for i, token in enumerate(tokens)]
        text = np.frombuffer(b"".join(texts), np.uint8)
        length = np.fromiter(map(len, texts), np.int64, len(texts))
        offset = np.cumsum(length) - length
        active, at = np.flatnonzero(length), np.zeros(np.count_nonzero(length), np.int64)
        levels, ended, ends, nodes = [], [], [], 1
        for depth in range(int(length.max(initial=0))):
            step = at * 256 + text[offset[active] + depth]
            found, at = np.unique(step, return_inverse=True)
            levels.append((found // 256, found % 256))
            last = length[active] == depth + 1
            ended.append(active[last])
            ends.append(nodes + at[last])
            nodes += len(found)
            active, at = active[~last], at[~last]
        return cls(
            size=len(tokens),
            eos_id=eos_id,
            fingerprint=digest.hexdigest(),
            levels=tuple(levels),
            token=np.concatenate([np.empty(0, np.int64), *ended]),
            node=np.concatenate([np.empty(0, np.int64), *ends]),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenAutomaton:
    """A deterministic automaton over tokens. It starts in state 0.

    It has S states, N tokens, C classes of tokens and E edges. Tokens of one class lead to the same
    state from every state. Every state can be reached from the start, and acceptance can be reached
    from every state.

    With an end-of-text token, the last state is the end of the text. Only that token leads there,
    from the accepting states and from the state itself.

    Attributes:
        pattern: the regex, for messages.
        eos_id: the end-of-text token, or None.
        accepting: whether the tokens read so far match, bool [S].
        class_of: the class of each token, int32 [N]; -1 for a token without an edge.
        edge_source: the state before each edge, int32 [E], ascending.
        edge_class: the class of each edge, int32 [E], ascending among the edges of a state.
        edge_target: the state after each edge, int32 [E].
        distance: the fewest tokens to an accepting state, int32 [S].
    """

    pattern: str
    eos_id: int | None
    accepting: np.ndarray
    class_of: np.ndarray
    edge_source: np.ndarray
    edge_class: np.ndarray
    edge_target: np.ndarray
    distance: np.ndarray

    @property
    def num_states(self) -> int:
        """The number of states, S."""
        return len(self.accepting)

    @property
    def num_classes(self) -> int:
        """The number of token classes, C."""
        return int(self.class_of.max(initial=-1)) + 1

    def step(self, state: int, token: int) -> int:
        """The state after ``token``, or -1 if no match continues with it."""
        first, end = np.searchsorted(self.edge_source, [state, state + 1])
        edge = first + np.searchsorted(self.edge_class[first:end], self.class_of[token])
        fits = edge < end and self.edge_class[edge] == self.class_of[token]
        return int(self.edge_target[edge]) if fits else -1

    def accepts(self, tokens: Sequence[int]) -> bool:
        """Whether the pattern matches the text of the tokens."""
        state = 0
        for token in tokens:
            state = self.step(state, token)
            if state < 0:
                return False
        return bool(self.accepting[state])


def compile_tokens(
    pattern: str, vocabulary: Vocabulary, *, cache_dir: Path | None = None
) -> TokenAutomaton:
    """Compile a pattern of ``re.fullmatch(pattern, text, re.ASCII)`` to a token automaton.

    Args:
        pattern: the regex.
        vocabulary: the tokens.
        cache_dir: a folder of earlier results. A result is read from it, or compiled and written
            to it; a damaged file is replaced. None always compiles.

    Raises:
        UserError: as ``compile_bytes`` and ``lift``.
    """
    if cache_dir is None:
        return lift(compile_bytes(pattern), vocabulary, pattern)
    key = f"{FORMAT} {vocabulary.fingerprint} {pattern}".encode("utf-8", "surrogatepass")
    path = cache_dir / f"{hashlib.sha256(key).hexdigest()}.npz"
    kept = _read(path, pattern, vocabulary)
    if kept is not None:
        return kept
    automaton = lift(compile_bytes(pattern), vocabulary, pattern)
    buffer = io.BytesIO()
    np.savez(buffer, **{name: getattr(automaton, name) for name in ARRAYS})
    with contextlib.suppress(UserError):  # a folder that cannot be written only costs time
        write_whole(path, buffer.getvalue())
    return automaton


def _read(path: Path, pattern: str, vocabulary: Vocabulary) -> TokenAutomaton | None:
    """The cached automaton in a file, or None if the file is missing or damaged.

    Damage to the arrays fails the checksums of the zip file. The other exceptions are those that
    zipfile and NumPy raise on damaged headers.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None
    return TokenAutomaton(pattern=pattern, eos_id=vocabulary.eos_id, **arrays)


def lift(automaton: ByteAutomaton, vocabulary: Vocabulary, pattern: str) -> TokenAutomaton:
    """Lift an automaton over bytes to the tokens of a vocabulary.

    Args:
        automaton: the automaton over bytes.
        vocabulary: the tokens.
        pattern: the regex, for messages.

    Raises:
        UserError: no sequence of tokens spells a match.
    """
    column_of, columns = _columns(automaton, vocabulary)
    class_of = np.full(vocabulary.size, -1, np.int32)
    class_of[vocabulary.token] = column_of[vocabulary.node]
    used = np.unique(class_of[class_of >= 0])
    edges = [columns[column] for column in used.tolist()]
    cls = np.repeat(used, [len(pairs) for pairs in edges])
    source, target = np.concatenate([np.empty((0, 2), np.int32), *edges]).T

    # Keep the states on paths of whole tokens from the start to acceptance.
    states = automaton.num_states
    reached = _distances(source, target, np.array([0]), states) >= 0
    distance = _distances(target, source, np.flatnonzero(automaton.accepting), states)
    kept = reached & (distance >= 0)
    if not kept[0]:
        raise UserError(_unspellable(automaton, vocabulary, pattern))
    rename = np.cumsum(kept, dtype=np.int32) - 1
    edge = kept[source] & kept[target]
    source, cls, target = rename[source[edge]], cls[edge], rename[target[edge]]
    class_of, source, cls, target = _merged(class_of, source, cls, target)
    accepting, distance = automaton.accepting[kept], distance[kept]
    if vocabulary.eos_id is not None:  # add the end of the text as a state
        done = len(accepting)
        end = class_of[vocabulary.eos_id] = class_of.max(initial=-1) + 1
        before = np.append(np.flatnonzero(accepting), done)
        source = np.concatenate([source, before])
        cls = np.concatenate([cls, np.full(len(before), end)])
        target = np.concatenate([target, np.full(len(before), done)])
        accepting, distance = np.append(accepting, True), np.append(distance, 0)
    order = np.lexsort((cls, source))
    return TokenAutomaton(
        pattern=pattern,
        eos_id=vocabulary.eos_id,
        accepting=accepting,
        class_of=class_of,
        edge_source=source[order].astype(np.int32),
        edge_class=cls[order].astype(np.int32),
        edge_target=target[order].astype(np.int32),
        distance=distance.astype(np.int32),
    )


def _columns(
    automaton: ByteAutomaton, vocabulary: Vocabulary
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The column of each node of the trie: where its bytes lead from each state.

    The work of a level is that of its distinct pairs of a parent's column and a class of bytes, not
    that of its nodes.

    Returns:
        The number of each node's column, -1 for an empty one; and the distinct columns as int32
        [n, 2]. A row has a state from which some match continues, ascending, and the next state.
    """
    by_byte = np.ascontiguousarray(automaton.transitions.T)
    classes: dict[bytes, int] = {}
    class_of_byte = np.array([classes.setdefault(row.tobytes(), len(classes)) for row in by_byte])
    _, one_of = np.unique(class_of_byte, return_index=True)
    states = np.arange(automaton.num_states, dtype=np.int32)
    columns = [np.stack([states, states], 1)]
    known = {columns[0].tobytes(): 0}
    column_of = [np.zeros(1, np.int64)]
    for parent, byte in vocabulary.levels:
        before = column_of[-1][parent]
        own = np.full(len(parent), -1)
        live = np.flatnonzero(before >= 0)
        pairs, which = np.unique(
            before[live] * 256 + class_of_byte[byte[live]], return_inverse=True
        )
        left = [columns[column] for column in (pairs // 256).tolist()]
        pair = np.repeat(np.arange(len(pairs)), [len(entries) for entries in left])
        entries = np.concatenate([np.empty((0, 2), np.int32), *left])
        target = by_byte[one_of[pairs[pair] % 256], entries[:, 1]]
        fits = target >= 0
        data = np.stack([entries[fits, 0], target[fits]], 1).tobytes()  # 8 bytes an entry
        ends = 8 * np.cumsum(np.bincount(pair[fits], minlength=len(pairs)))
        number = np.full(len(pairs), -1)
        start = 0
        for place, end in enumerate(ends.tolist()):
            key, start = data[start:end], end
            if key and key not in known:
                known[key] = len(columns)
                columns.append(np.frombuffer(key, np.int32).reshape(-1, 2))
            number[place] = known.get(key, -1)
        own[live] = number[which]
        column_of.append(own)
    return np.concatenate(column_of), columns


def _merged(
    class_of: np.ndarray, source: np.ndarray, cls: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Number the classes from 0, and merge those that have become equal.

    ``lift`` has removed states and their edges. A class may now have no edges, and two classes may
    have the same edges.

    Args:
        class_of: the old class of each token.
        source: the state before each edge.
        cls: the old class of each edge, ascending.
        target: the state after each edge.

    Returns:
        The new class of each token, and source, class and target of the edges that remain.
    """
    old, first = np.unique(cls, return_index=True)
    known: dict[bytes, int] = {}
    number, new = np.empty(len(old), np.int32), np.empty(len(old), bool)
    pairs = np.split(np.stack([source, target], 1), first[1:])
    for place, part in zip(range(len(old)), pairs, strict=False):  # without classes: one empty part
        new[place] = part.tobytes() not in known
        number[place] = known.setdefault(part.tobytes(), len(known))
    rename = np.full(int(class_of.max(initial=-1)) + 2, -1, np.int32)
    rename[old] = number
    kept = new[np.searchsorted(old, cls)]
    return rename[class_of], source[kept], rename[cls[kept]], target[kept]


def _unspellable(automaton: ByteAutomaton, vocabulary: Vocabulary, pattern: str) -> str:
    """The message that no tokens spell a match.

    It names a missing byte if that is the reason: of the states that tokens' bytes can reach, take
    the one nearest to acceptance; a byte that leads from it nearer to acceptance is in no token.
    """
    problem = f"the vocabulary cannot spell anything that regex {shown(pattern)} matches"
    present = np.zeros(256, bool)  # bytes that some token contains
    for _, byte in vocabulary.levels:
        present[byte] = True
    source, byte = np.nonzero(automaton.transitions >= 0)
    target = automaton.transitions[source, byte]
    states = automaton.num_states
    reached = _distances(source[present[byte]], target[present[byte]], np.array([0]), states)
    if (reached[automaton.accepting] >= 0).any():
        return problem
    left = _distances(target, source, np.flatnonzero(automaton.accepting), states)
    nearest = min(np.flatnonzero(reached >= 0).tolist(), key=lambda state: left[state])
    missing = int(byte[(source == nearest) & (left[target] < left[nearest])][0])
    name = f"the character {chr(missing)!r}" if missing < 0x80 else f"the byte 0x{missing:02x}"
    return f"{problem}: no token holds {name}"


def _distances(
    source: np.ndarray, target: np.ndarray, start: np.ndarray, states: int
) -> np.ndarray:
    """The fewest edges from any state of ``start`` to each state, -1 if there is no path.

    A breadth-first search that visits all edges of a distance at once.
    """
    source, target = np.divmod(np.unique(source.astype(np.int64) * states + target), states)
    bounds = np.searchsorted(source, np.arange(states + 1))
    distance = np.full(states, -1)
    distance[start] = 0
    far = 0
    while len(start):
        far += 1
        size = bounds[start + 1] - bounds[start]
        offset = np.repeat(bounds[start] - (np.cumsum(size) - size), size)
        start = np.unique(target[offset + np.arange(size.sum())])
        start = start[distance[start] < 0]
        distance[start] = far
    return distance
