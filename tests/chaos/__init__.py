"""What the broker promises, held against real processes that are killed, frozen, cut off and starved.

Why: the tests beside this folder decide when something fails; here it fails at random moments, in processes that were not
told. Web and worker run as an operator runs them, each as a host of its own, against a real PostgreSQL or an SQLite file
and against an emulated provider that rotates refresh tokens and revokes the family when an old one comes back.

What it must never do: believe the product. Whether a token was lost, expired or spent twice stands in the provider's
books; of the product's own words only those are read that say which process held a lease and where an attempt ended.

One decision with its price: every scenario runs in a process of its own with a provider of its own, so they share nothing
but the PostgreSQL server and may wait at the same time. The price is some 300 MB for each that runs.

What it cannot show: it samples moments and does not visit all of them. Three losses are outside of anybody's power and are
counted apart: an answer that nobody read, because its holder was killed or the provider never sent it; an answer read but
not yet on the disk; a holder frozen for longer than the access token lives, which is therefore never done here. The second
is measured, and so is how long a request is checked but not yet sent.

The map: `child` starts the product's processes, `hosts` kills and freezes them, `stage` sets up an installation and its
connections, `probing` asks for tokens all the while, `books` judges, `tally` counts and draws the table, `profiles` says how
long and how often, `scenarios` what goes wrong.
"""
