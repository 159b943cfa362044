"""What happens without being asked for: tokens refreshed in time, grants given back, old rows removed.

Owns when work is done and how much of it at once: the worker's loop over due connections (`worker`), and the chores
that run every so often beside it (`schedule`, `housekeeping`). Must never know how a token is refreshed or a grant is
revoked; that is the broker's, and a worker comes in through the same doors as a request. Nobody imports it but the
command line.

Any number of workers on any number of hosts may run. They share the work through the rows themselves: whoever claims a
connection puts its next look a few seconds off, and the lease decides if two come to the same one after all.

Decision: what is claimed is not a promise. A worker that dies, or finds an app busy or paused, simply lets go, and the
row is due again when its hold has passed. The price is that such a connection waits for those seconds, so the hold is
kept far shorter than the time a token is refreshed ahead of its expiry.
"""
