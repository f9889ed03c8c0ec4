"""Images read ahead of their turn by threads; which image is read when never depends on the threads."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from stepdistill.data.images import ImageBatch, ImageSet


class ReadAhead:
    """Reads batches of an image set, and the one that is expected next while the present one is worked on.

    Threads and no processes: Pillow decodes outside of Python's lock, nothing has to be pickled, and a killed run
    leaves nobody behind.

    Args:
        images: what to read.
        workers: threads; 0 reads when asked.
    """

    def __init__(self, images: ImageSet, workers: int) -> None:
        self._images = images
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="images") if workers else None
        self._ahead: dict[tuple[int, ...], list[Future[ImageBatch]]] = {}

    def read(self, indices: list[int], following: list[int]) -> ImageBatch:
        """The images with these numbers.

        Args:
            indices: of one bucket.
            following: numbers that will probably be asked for next.
        """
        if self._pool is None:
            return self._images.batch(indices)
        parts = self._ahead.pop(tuple(indices), None) or self._submit(indices)
        self._ahead = {tuple(following): self._submit(following)}  # what a wrong guess has read is forgotten
        read = [part.result() for part in parts]
        return ImageBatch(torch.cat([batch.images for batch in read]), [batch.captions[0] for batch in read])

    def _submit(self, indices: list[int]) -> list[Future[ImageBatch]]:
        assert self._pool is not None, "asked for only with workers"
        return [self._pool.submit(self._images.batch, [index]) for index in indices]
