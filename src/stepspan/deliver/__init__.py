"""Delivery: from the journal to a receiver, at least once, ending as effectively once.

In the training process:

delivery      what a run holds of it: none, a deliverer process, or threads
routes        a destination, and how it is reached: with which credentials
begun         what a session's header says of where it goes
lock          the right to deliver by a route from a host
spawn         starting a deliverer process
shared_exporter  an exporter object that several runs of the process were given

In the deliverer:

process       what runs inside that process
sessions      which sessions it sends while jobs run
deliverer     all destinations and signals, a thread each
scheduler     one signal of one destination: which session may go on, in one merge by event time
task          one session's signal: read a batch, send it, move the cursor
batches       events as batches of records
session_end   whether more events may come
backoff       when to try again
isolation     finding the records that a receiver refuses among those it takes
dead_letters  the records that were refused for good
health        what a deliverer reports about itself, as metrics
options       what all of these have in common

ledgers       what the cursors say, for people
"""
