"""The client side of OAuth 2.0: what we ask an authorization server for, and what its answer means.

Owns the handful of ways a token request can end (`outcomes`), what may stand behind each and who mends it
(`causes`), sending a request as a registered client (`client`), the secrets of one browser round trip
(`handshake`) and the port that every vendor fills (`provider`, in itself a plain RFC 6749 client). Used by
`providers`, which add a vendor each, and by the broker, which decides what becomes of a connection.

Must never know a vendor, a table, a connection's state or whether somebody waits: an outcome is told, not
acted upon.

Decision: answers are judged by an own short table instead of an OAuth library's session. A library gives a
token or an exception; the broker must know six endings apart, because asking again after a lost answer can
revoke a whole token family. The price is that every oddity of a vendor must be written down here or in its
provider file before it is understood.
"""
