"""XMP packets (ISO 16684-1): statements about a picture, by names that other programs know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from xml.etree import ElementTree
from xml.sax.saxutils import escape

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
NAMESPACES = {
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "TC260": "http://www.tc260.org.cn/ns/AIGC/1.0/",  # GB 45438: where its guides for pictures put the label
    "ldm": "urn:ldm:1.0:",
}
DESCRIPTION, REQUEST, CREATOR_TOOL = "dc:description", "ldm:request", "xmp:CreatorTool"
MAX_STATEMENTS = 10_000  # of a stranger's packet: all else in it is passed over


def packet(statements: Mapping[str, str]) -> bytes:
    """One packet of statements by their qualified names, such as "xmp:CreatorTool".

    What XML cannot hold becomes U+FFFD, in a request, which is JSON, an escape.
    """
    prefixes = dict.fromkeys(name.partition(":")[0] for name in statements)
    spaces = "".join(f' xmlns:{prefix}="{NAMESPACES[prefix]}"' for prefix in prefixes)
    said = "".join(f"<{name}>{_value(name, text)}</{name}>" for name, text in statements.items())
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        f'<rdf:RDF xmlns:rdf="{RDF}"><rdf:Description rdf:about=""{spaces}>{said}</rdf:Description></rdf:RDF>'
        '</x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def statements_in(packet: bytes | str) -> dict[str, str]:
    """The statements of NAMESPACES in a packet, whoever wrote it last; of each the first that is not empty.

    {} of one that cannot be read.
    """
    text = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else packet
    if "<!" in text:  # XMP declares no types and no entities
        return {}
    try:
        tree = ElementTree.fromstring(text.strip("\0 \n\r\t\ufeff"))
    except ElementTree.ParseError:
        return {}
    found: dict[str, str] = {}
    for count, (name, value) in enumerate(_pairs(tree)):
        if count == MAX_STATEMENTS:
            break
        if value and (known := _qualified(name)) is not None:
            found.setdefault(known, value)
    return found


def _pairs(tree: ElementTree.Element) -> Iterator[tuple[str, str]]:
    """Each element's text, be it within an rdf:Alt or a resource's address; each attribute."""
    for each in tree.iter():
        listed = each.find(f"*/{{{RDF}}}li")
        own = each.text if listed is None else listed.text
        yield each.tag, (each.get(f"{{{RDF}}}resource") or own or "").strip()
        yield from each.attrib.items()


def _qualified(name: str) -> str | None:
    """ "{http://purl.org/dc/elements/1.1/}title" -> "dc:title"; None for another namespace."""
    space, _, local = name.removeprefix("{").rpartition("}")
    known = (prefix for prefix, uri in NAMESPACES.items() if uri.rstrip("/") == space.rstrip("/"))
    prefix = next(known, None)
    return None if prefix is None or not space else f"{prefix}:{local}"


def _value(name: str, text: str) -> str:
    if name == REQUEST:
        return escape("".join(c if _in_xml(c) else f"\\u{ord(c):04x}" for c in text))
    value = escape("".join(c if _in_xml(c) else "\ufffd" for c in text))
    # A text that may be told in several languages.
    told = f'<rdf:Alt><rdf:li xml:lang="x-default">{value}</rdf:li></rdf:Alt>'
    return told if name == DESCRIPTION else value


def _in_xml(c: str) -> bool:
    return c in "\t\n\r" or "\x20" <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" or c >= "\U00010000"
