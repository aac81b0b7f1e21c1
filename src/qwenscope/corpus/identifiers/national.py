"""National identity, tax and insurance numbers of persons, and passports."""

from __future__ import annotations

import importlib
import re
from functools import cache, lru_cache
from typing import Any

from qwenscope.corpus.identifiers.rules import Gate, Rule, Span, before, cue, is_named_by, numbers, where

# Numbers whose shape says enough, with the checksum that decides ("": none): of digits, and with letters.
_DIGITS = {
    r"[0-9]{3}-[0-9]{2}-[0-9]{4}": "us.ssn",
    r"[1-9][0-9]{5}(?:19|20)[0-9]{2}[01][0-9][0-3][0-9]{4}[0-9Xx]": "cn.ric",
    r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}": "br.cpf",
    r"[0-9]{8}-?[A-Za-z]": "es.dni",
    r"[XYZxyz]-?[0-9]{7}-?[A-Za-z]": "es.nie",
    r"[12] ?[0-9]{2} ?[0-9]{2} ?[0-9]{2} ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}": "fr.nir",
    r"[0-9]{2}[01][0-9][0-3][0-9]-[1-8][0-9]{6}": "kr.rrn",
    r"(?:19|20)?[0-9]{6}[\-+][0-9]{4}": "se.personnummer",
    r"[0-9]{6}/[0-9]{3,4}": "cz.rc",
    r"[0-9]{1,2}\.[0-9]{3}\.[0-9]{3}-[0-9Kk]": "cl.rut",
    r"2[0347]-[0-9]{8}-[0-9]": "ar.cuit",
    r"[0-9]{2}\.[0-9]{2}\.[0-9]{2}-[0-9]{3}\.[0-9]{2}": "be.nn",
    r"756\.[0-9]{4}\.[0-9]{4}\.[0-9]{2}": "ch.ssn",
    r"[0-9]{3}-[0-9]{3}-[0-9]{3} [0-9]{2}": "",  # Russian SNILS
    r"[0-9]-[0-9]{4}-[0-9]{5}-[0-9]{2}-[0-9]": "th.pin",
}
_LETTERS = {
    r"[A-Za-z]{6}[0-9]{2}[A-EHLMPRSTa-ehlmprst][0-9]{2}[A-Za-z][0-9]{3}[A-Za-z]": "it.codicefiscale",
    r"[0-3][0-9][01][0-9]{3}[\-+A-FU-Y][0-9]{3}[0-9A-Ya-y]": "fi.hetu",
    r"[A-Z]{4}[0-9]{6}[HM][A-Z]{5}[0-9A-Z][0-9]": "mx.curp",
    r"[A-Z]{3}P[A-Z][0-9]{4}[A-Z]": "in_.pan",
    r"[A-CEGHJ-PR-TW-Z]{2} [0-9]{2} [0-9]{2} [0-9]{2} [A-D]": "",  # British national insurance
}
_CHECKED = re.findall(
    r"\S+",
    """
de.idnr in_.aadhaar br.cpf cn.ric pl.pesel nl.bsn se.personnummer no.fodselsnummer dk.cpr fi.hetu es.dni es.nie
it.codicefiscale
fr.nir fr.nif tr.tckimlik za.idnr ro.cnp bg.egn ee.ik lt.asmens hr.oib pt.nif gr.amka il.idnr ie.pps gb.nhs gb.utr
ca.sin au.tfn
ru.inn ua.rntrc th.pin my.nric id.nik kr.rrn cz.rc at.vnr is_.kennitala mx.curp cl.rut ar.cuit ar.dni be.nn ch.ssn
pk.cnic
in_.pan in_.epic jp.in_ us.itin us.ssn lv.pvn in_.vid eg.tn
""",
)

_CUE = cue(
    r"(?<![A-Za-z])(?:ssn|social security|itin|tax(?:payer)?[ _\-]?(?:id|number|no|file)(?:entification)?|idnr"
    r"|steuer\w{0,30}|"
    r"st-?nr|aadha+r|cpf|pesel|bsn|burgerservicenummer|personn?ummer|person(?:al)?[ _]?id|fødselsnummer"
    r"|personnummer|cpr|hetu|henkilötunnus|"
    r"codice fiscale|c\.?f\.?|num[ée]ro de s[ée]curit[ée] sociale|s[ée]curit[ée] sociale|kimlik|"
    r"teudat zehut|national insurance|national id(?:entity)?|identity (?:card|number|no)|"
    r"id card|id[ _]?number|id no|social insurance|medicare|snils|nric|my ?kad|rrn|rodn[ée] [čc][íi]slo|curp|"
    r"cuit|cuil|c[ée]dula|svnr|kennitala|cnic|isikukood|asmens kodas|citizen id|rsa id|my number|"
    r"tckn|cnp|egn|amka|(?-i:TFN|PAN|TIN|DNI|NIE|NIF|NIR|TC|OIB|PPSN?|NHS|NINO|SIN|INN|NIK|KTP|RUT|RUN|AHV|AVS"
    r"|AK)|dni)(?![A-Za-z])"
    r"|身份证|身份證|身分證|税号|инн(?!\w)|снилс|иин|рнокпп|іпн|егн|マイナンバー|個人番号|주민등록|주민번호|आधार|पैन|บัตรประชาชน|ประชาชน"
    r"|ประจำตัว|הזהות|תעודת|זהות|ת\.ז|ת\"ז|הות|الهوية|الوطنية|الرقم القومي|کد ملی|αφμ|αμκα"
)
_LABEL = re.compile(rf"(?:{_CUE.pattern})[ A-Za-z\u00c0-\u024f]{{1,24}}[:=] ?$", re.IGNORECASE)  # "BSN of the client: "
_SSN_CUE = re.compile(r"(?<![A-Za-z])(?:ssn|social security|itin)(?![A-Za-z])", re.IGNORECASE)
_PASSPORT_CUE = cue(
    r"(?<![A-Za-z])(?:passports?|pasaporte|passaporto|passaporte|passeport|reisepass|paspoort|paszport\w?|pass"
    r"|pasaport|paspor|"
    r"driver'?s? licen[cs]e|driving licen[cs]e|f[üu]hrerschein\w*|\w*ausweis\w*|national insurance(?: number)?"
    r"|nino|(?-i:NI))(?![A-Za-z])"
    r"|护照|護照|паспорт|パスポート|旅券|여권|جواز|דרכון|पासपोर्ट|พาสปอร์ต|หนังสือเดินทาง"
)
_NAMED = re.compile(
    r"(?<![0-9A-Za-z])(?:[A-Z]{1,4}[ \-]?)?[0-9](?:[ \t.\-/]{0,2}[0-9]){6,17}(?:[ \-]?[0-9A-Za-z])?(?![0-9A-Za-z])"
    r"|(?<![0-9A-Za-z])"
    r"[A-Za-z]{6}[0-9]{2}[A-Za-z][0-9]{2}[A-Za-z][0-9]{3}[A-Za-z](?![0-9A-Za-z])"
)
_PASSPORT = re.compile(
    r"(?<![0-9A-Za-z])(?:(?=[A-Z0-9 ]{0,8}[0-9])[0-9A-Z]{1,4} ?[0-9A-Z]{0,2} ?[0-9A-Z]{4,10}"
    r"|(?=[a-z]{0,5}[0-9])[0-9a-z]{6,16})(?![0-9A-Za-z])"
)


_OF_PASSPORTS = tuple(
    re.findall(
        r"\S+",
        """pas Pas PAS icen ICEN rschein usweis nsurance nino NINO NI 护照 護照 паспорт Паспорт パスポート 旅券 여권
    جواز דרכון सप พาสปอร ทาง""",
    )
)


@cache
def _module(name: str) -> Any:
    return importlib.import_module(f"stdnum.{name}")


@lru_cache(maxsize=4096)
def _has_checksum(number: str) -> bool:
    """Whether `number`, without separators, is one of the countries' here."""
    return any(_module(name).is_valid(number) for name in _CHECKED)


def _shape_rule(gate: Gate, shapes: dict[str, str]) -> Rule:
    modules = ("", *shapes.values())

    def check(match: re.Match[str]) -> Span | None:
        module = modules[match.lastindex or 0]
        if match[0].upper() in ("12345678Z", "00000000T", "987-65-4321", "123-45-6789"):  # everybody's example
            return None
        return match.span() if not module or _module(module).is_valid(match[0]) else None

    shape = "|".join(f"({shape})" for shape in shapes)
    pattern = re.compile(
        rf"(?:(?<![0-9A-Za-z_.\-/])|(?<=SSN)|(?<=ssn)|(?<=CPF)|(?<=cpf))(?:{shape})(?![0-9A-Za-z_\-/]|\.[0-9])"
    )
    return Rule("NATIONAL_ID", gate, pattern, check)


def _named(match: re.Match[str]) -> Span | None:
    text = before(match)
    if not is_named_by(_CUE, text) and not (text.endswith((":", "=", ": ", "= ")) and _LABEL.search(text)):
        return None
    compact = re.sub(r"[ \t.\-/]", "", match[0]).upper()
    return match.span() if _has_checksum(compact) or (len(compact) == 9 and is_named_by(_SSN_CUE, text)) else None


def _passport(match: re.Match[str]) -> Span | None:
    compact = match[0].replace(" ", "")
    enough = 6 <= len(compact) <= 16 and sum(char.isdecimal() for char in compact) >= 3
    return match.span() if enough and is_named_by(_PASSPORT_CUE, before(match)) else None


RULES = (
    _shape_rule(numbers, _DIGITS),
    _shape_rule(
        where(r"[0-9][0-9](?:[0-9]{4}[\-+A-Z]|[0-9]{2}[A-Z]|[A-Za-z][0-9]{2}[A-Za-z][0-9]| [0-9]{2} [0-9]{2} [A-D])"),
        _LETTERS,
    ),
    Rule("NATIONAL_ID", numbers, _NAMED, _named),
    Rule("NATIONAL_ID", where(r"[0-9][0-9A-Za-z]{4}"), _PASSPORT, _passport, _OF_PASSPORTS),
)
