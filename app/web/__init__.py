"""The HTTP face: requests in, answers out, and nothing decided here.

Owns routes, the strict reading of what comes in, cookies and CSRF, the pages, and the two shapes of an error
(`problems`, RFC 9457; OAuth endpoints answer in RFC 6749's). Who may do something is decided by `access`, what is done by
`broker`. Must never know: SQL, sealing, what a vendor calls things, or when a token must be refreshed.

    application   create_app: puts the parts below together
    envelope      what every answer carries: security headers, a request id
    arguments     queries, JSON bodies and forms read strictly (pure)
    asking        who asks: caller, admin, address behind proxies
    problems      every error as an answer
    tokens        the hand-out path
    express_worker  gunicorn's worker, in which token requests that arrive together share a thread and a wait
    connections   list, show, refresh, switch, disconnect
    oauth         our own authorization server's endpoints
    connect       the browser's trip to a provider and back
    admin         the console
    health        livez, readyz, health, metrics
    openapi       the description of it all, and the pages made of it

Decision: the hand-out path reads its query by hand and sends bytes composed once per connection and generation, while all
other API routes go through flask-smorest and marshmallow. The price is that the description of that one path is written by
hand; schemathesis holds it to the code.
"""
