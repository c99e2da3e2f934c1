"""The ledger that a worker keeps of one update: what must come, what came, and everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping

from tulu_mega.weight_transfer.protocol import Bucket, Manifest


class Ledger:
    """One update, as one worker sees it. Problems are collected, never raised; each names tensor, sender and worker.

    Args:
        worker: this worker's rank in its server.
        version: that the update brings.
        manifest: the tensors it has to bring.
    """

    def __init__(self, worker: int, version: int, manifest: Manifest):
        self.worker, self.version, self.manifest = worker, version, manifest
        self.checksums: dict[str, str] = {}
        """Checksums of the bytes that arrived, by tensor name."""
        self.nbytes = 0
        self.problems: list[str] = []

    def wrong(self, problem: str) -> None:
        """Note a problem of the update as a whole."""
        self.problems.append(f"worker {self.worker}: update {self.version}: {problem}")

    def check(self, version: int, bucket: Bucket, capacity: int) -> bool:
        """Return whether a bucket is as announced: tensors of that sender, each once, of the right sizes, inside the buffer.

        Args:
            capacity: bytes of the buffer.
        """
        before = len(self.problems)
        if version != self.version:
            self.wrong(f"a bucket from trainer rank {bucket.sender} is of update {version}")
        named: set[str] = set()
        for place in bucket.places:
            expected = self.manifest.get(place.name)
            if expected is None:
                self._tensor(place.name, bucket.sender, "is not in the manifest")
                continue
            if expected.sender != bucket.sender:
                self._tensor(place.name, bucket.sender, f"is for trainer rank {expected.sender} to send")
            if place.name in self.checksums or place.name in named:
                self._tensor(place.name, bucket.sender, "came a second time")
            if place.nbytes != expected.nbytes:
                shape = f"{list(expected.shape)} of {expected.dtype}"
                self._tensor(place.name, bucket.sender, f"has {place.nbytes} bytes, expected {expected.nbytes} for {shape}")
            if place.offset < 0 or place.offset + place.nbytes > capacity:
                self._tensor(place.name, bucket.sender, f"lies outside the buffer of {capacity} bytes")
            named.add(place.name)
        return len(self.problems) == before

    def arrived(self, name: str, checksum: str) -> None:
        """Note the arrival of a tensor whose bucket passed the check."""
        self.checksums[name] = checksum
        self.nbytes += self.manifest[name].nbytes

    def compare(self, version: int, checksums: Mapping[str, str]) -> None:
        """Note tensors that did not arrive, or whose bytes are not those that were sent.

        Args:
            checksums: by name, as the senders took them.
        """
        if version != self.version:
            self.wrong(f"the commit is of update {version}")
        for name, expected in self.manifest.items():
            if name not in self.checksums:
                self._tensor(name, expected.sender, "did not come")
            elif name not in checksums:
                self._tensor(name, expected.sender, "came, but its sender gave no checksum")
            elif checksums[name] != self.checksums[name]:
                told = f"arrived with checksum {self.checksums[name]}, was sent with {checksums[name]}"
                self._tensor(name, expected.sender, told)
        for name in checksums.keys() - self.manifest.keys():
            self.wrong(f"{name}: has a checksum, but is not in the manifest")

    def not_loaded(self, name: str, reason: str) -> None:
        """Note a tensor that vLLM did not take."""
        self._tensor(name, self.manifest[name].sender, reason)

    def _tensor(self, name: str, sender: int, what: str) -> None:
        self.wrong(f"{name} from trainer rank {sender} {what}")
