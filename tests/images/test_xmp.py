"""Statements about pictures, as other programs write and read them."""

import random
from xml.etree import ElementTree

import pytest

from ldm.images.xmp import DESCRIPTION, MAX_STATEMENTS, NAMESPACES, RDF, REQUEST, packet, statements_in

HOSTILE = 'eine "Brücke", <b>橋</b> & ⛵\U0001f600 ]]> --> <!-- <?xpacket end="w"?> &amp; {x}'


@pytest.mark.parametrize("name", ["Iptc4xmpExt:AISystemUsed", "TC260:AIGC", DESCRIPTION, REQUEST])
def test_what_is_said_is_read_back_whatever_it_holds(name):
    said = {name: HOSTILE, "xmp:CreatorTool": "ldm"}
    written = packet(said)
    assert statements_in(written) == said
    tree = ElementTree.fromstring(written)
    prefix, local = name.split(":")
    (found,) = tree.iter(f"{{{NAMESPACES[prefix]}}}{local}")
    assert "".join(found.itertext()) == HOSTILE
    assert b"<!" not in written  # or it would not be read


def test_any_text_gives_well_formed_xml():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(
            chr(rng.choice([rng.randrange(0x20), rng.randrange(0xD800), 0xFFFF])) for _ in range(20)
        )
        (read,) = statements_in(packet({"xmp:CreatorTool": f"a{text}b"})).values()
        assert (read[0], read[-1]) == ("a", "b")


def test_characters_that_xml_cannot_hold():
    assert statements_in(packet({"xmp:CreatorTool": "a\x07\uffff"})) == {"xmp:CreatorTool": "a\ufffd\ufffd"}
    assert statements_in(packet({REQUEST: '{"a": "\uffff"}'})) == {REQUEST: '{"a": "\\uffff"}'}


def test_a_source_that_is_a_resource():
    text = (
        f'<rdf:RDF xmlns:rdf="{RDF}" xmlns:e="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
        '<rdf:Description><e:DigitalSourceType rdf:resource="http://a"/></rdf:Description></rdf:RDF>'
    )
    assert statements_in(text) == {"Iptc4xmpExt:DigitalSourceType": "http://a"}


def test_endless_packets_are_left():
    many = "<a/>" * (MAX_STATEMENTS + 1)
    late = '<q:request xmlns:q="urn:ldm:1.0:">{}</q:request>'
    assert statements_in(f"<x>{late}{many}</x>") == {REQUEST: "{}"}
    assert statements_in(f"<x>{many}{late}</x>") == {}


def test_a_packet_that_another_program_wrote_again_is_read():
    attribute = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:q="urn:ldm:1.0:" q:request="{&quot;version&quot;: 3}"/></rdf:RDF></x:xmpmeta>'
    )
    assert statements_in(attribute) == {REQUEST: '{"version": 3}'}


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\xff\xfe",
        b"<x",
        b'<a xmlns="urn:ldm:1.0:">',
        b'<!DOCTYPE a [<!ENTITY b "c">]><a xmlns="urn:ldm:1.0:"><request>&b;</request></a>',
    ],
)
def test_packets_that_say_nothing(packet):
    assert statements_in(packet) == {}
