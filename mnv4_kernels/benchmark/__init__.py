"""Whole-model measurements: one process per runtime, interleaved rounds, outputs checked first.

`case` says what is measured, `runtimes` lists who competes, `worker` is one competitor's
process, `rounds` conducts them, `report` turns what came back into tables, JSON and HTML.
"""
