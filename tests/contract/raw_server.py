"""A server that behaves as badly as a test wants: each connection is handed to a function."""

import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Behaviour = Callable[[socket.socket], None]


@dataclass
class RawServer:
    """Listens on a port of 127.0.0.1 and counts the connections."""

    port: int
    connections: int = 0
    release: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """The address over plain http."""
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(behave: Callable[[RawServer, socket.socket], None]) -> Iterator[RawServer]:
    """Serve every connection in a thread of its own until the test is over; `server.release` is set then."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = RawServer(listener.getsockname()[1])
        threads: list[threading.Thread] = []

        def one(connection: socket.socket) -> None:
            with connection:
                try:
                    behave(server, connection)
                except (OSError, EOFError):
                    return  # the client went away, which is its good right

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                if server.release.is_set():
                    connection.close()
                    return
                server.connections += 1
                thread = threading.Thread(target=one, args=(connection,), daemon=True)
                threads.append(thread)
                thread.start()

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        try:
            yield server
        finally:
            server.release.set()
            socket.create_connection(("127.0.0.1", server.port)).close()
            accepting.join()
            for thread in threads:
                thread.join(5)


def read_head(connection: socket.socket) -> bytes:
    """Everything up to and with the empty line, one byte at a time so that the body stays unread."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        if not byte:
            raise EOFError
        head += byte
    return head


def read_request(connection: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of a request with Content-Length."""
    head = read_head(connection)
    length = 0
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    body = b""
    while len(body) < length:
        piece = connection.recv(length - len(body))
        if not piece:
            raise EOFError
        body += piece
    return head, body


def answer(body: bytes, *, status: str = "200 OK", headers: str = "") -> bytes:
    """A well-formed answer with this body."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


@dataclass(frozen=True)
class Identity:
    """A key, a certificate for some names, and the authority that vouches for it."""

    authority: Path
    chain: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        """The server's side of TLS."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.chain, self.key)
        return context


def make_identity(directory: Path, *names: str) -> Identity:
    """An authority of its own and a certificate it issued for these names, valid for a day."""
    authority_key = ec.generate_private_key(ec.SECP256R1())
    key = ec.generate_private_key(ec.SECP256R1())
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "A test authority")])
    authority = _certificate(authority_name, authority_key, authority_name, authority_key, ())
    leaf_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    leaf = _certificate(leaf_name, key, authority_name, authority_key, names)
    identity = Identity(directory / "authority.pem", directory / "chain.pem", directory / "key.pem")
    identity.authority.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    identity.chain.write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    identity.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return identity


def _certificate(
    name: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    names: tuple[str, ...],
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=not names, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )
    if names:
        alternatives = x509.SubjectAlternativeName([_alternative(one) for one in names])
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(alternatives, critical=False).add_extension(usage, critical=False)
    else:
        usage_bits = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        builder = builder.add_extension(usage_bits, critical=True)
    return builder.sign(issuer_key, hashes.SHA256())


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
