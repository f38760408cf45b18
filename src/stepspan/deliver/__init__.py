"""Delivery: from the journal to a receiver, at least once, ending as effectively once.

deliverer   all destinations and signals of some paths; a thread each
shipper     one signal of one destination: which session may go on, in one merge by event time
lane        one session's signal: read, process, map, send, move the cursor
isolation   finding the records that a receiver refuses among those it takes
ledgers     what the cursors say, for people
health      what a deliverer tells of itself, as metrics
process     the deliverer as a process of its own, one a host and destination
handle      what a run holds of it
"""
