"""Token caches in memory, for tests of what reads them."""


class TableOfDocuments:
    """What a loader asks of a cache, from its table ``documents``."""

    def document_starts(self, start, stop):
        starts = self.documents["start"]
        first = int((starts <= start).sum()) - 1
        return first, starts[first : int((starts < stop).sum())]

    def read_many(self, ranges):
        return [self.tokens(start, stop) for start, stop in ranges]

    def document_name(self, number):
        return str(self.documents["name"][number])
