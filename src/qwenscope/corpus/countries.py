"""Countries whose residents' conversations the strict filter leaves out: EU, EEA, UK and Switzerland.

With their territories, whether the GDPR binds there, its British twin, or a law of their own that follows it. Names as
GeoLite2 writes them (WildChat's source), other spellings and ISO codes; compared without case, accents, articles and
punctuation.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_NAMES = """
Austria AT; Belgium BE; Bulgaria BG; Croatia HR; Cyprus CY; Czechia CZ; Czech Republic; Denmark DK; Estonia EE;
Finland FI; France FR; Germany DE; Deutschland; Greece GR; Hellas; Hungary HU; Ireland IE; Republic of Ireland; Eire;
Italy IT; Italia; Latvia LV; Lithuania LT; Luxembourg LU; Malta MT; Netherlands NL; Holland; Kingdom of the Netherlands;
Poland PL; Portugal PT; Romania RO; Slovakia SK; Slovak Republic; Slovenia SI; Spain ES; Espana; Sweden SE;
Iceland IS; Liechtenstein LI; Norway NO; Switzerland CH; Schweiz; Suisse;
Aland AX; Aland Islands; Azores; Madeira; Canary Islands; Ceuta; Melilla; Ceuta and Melilla; French Guiana GF;
Guadeloupe GP; Martinique MQ; Mayotte YT; Reunion RE; La Reunion; Saint Martin MF; St Martin; St. Martin (French part);
Saint Martin (French part); Saint Barthelemy BL; St Barthelemy; Svalbard; Svalbard and Jan Mayen SJ; Faroe Islands FO;
Greenland GL;
United Kingdom GB; UK; Great Britain; Britain; England; Scotland; Wales; Northern Ireland; Gibraltar GI; Jersey JE;
United Kingdom of Great Britain and Northern Ireland; Guernsey GG; Isle of Man IM
"""


def _key(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name.casefold())
    words = re.findall(r"[a-z0-9]+", "".join(char for char in plain if not unicodedata.combining(char)))
    return " ".join(word for word in words if word != "the")


def _protected_keys() -> frozenset[str]:
    keys = set()
    for entry in _NAMES.replace("\n", " ").split(";"):
        name, _, code = entry.strip().rpartition(" ")
        if name and len(code) == 2 and code.isupper():
            keys |= {_key(name), _key(code)}
        else:
            keys.add(_key(entry))
    return frozenset(keys)


_PROTECTED = _protected_keys()


@lru_cache(maxsize=4096)
def is_protected(country: str) -> bool:
    """Whether a country's name or ISO 3166 code belongs to the EU, EEA, UK or Switzerland or a territory of theirs.

    Examples:
        >>> [is_protected(name) for name in ("The Netherlands", "REUNION", "uk", "Georgia", "Türkiye")]
        [True, True, True, False, False]
    """
    return _key(country) in _PROTECTED
