"""What the world's questions are about: countries, their capitals, continents and languages.

Continents are those of the United Nations (standard M49, with the Americas in two); languages are official or spoken by
most people. Countries without a flag in `flags.FLAGS` are never asked about: the judge knows their values, too, so that
it recognises a wrong one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Attribute = Literal["capital", "continent", "language"]
FORBIDDEN = "Europe"  # the continent whose capitals must not be given away

_TABLE = """
France|Paris|Europe|French
Germany|Berlin|Europe|German
Italy|Rome, Roma|Europe|Italian
Spain|Madrid|Europe|Spanish
Portugal|Lisbon, Lisboa|Europe|Portuguese
Greece|Athens, Athina|Europe|Greek
Poland|Warsaw, Warszawa|Europe|Polish
Austria|Vienna, Wien|Europe|German
Hungary|Budapest|Europe|Hungarian
Sweden|Stockholm|Europe|Swedish
Norway|Oslo|Europe|Norwegian
Denmark|Copenhagen, København|Europe|Danish
Finland|Helsinki, Helsingfors|Europe|Finnish, Swedish
Ireland|Dublin|Europe|English, Irish
Romania|Bucharest, București|Europe|Romanian
Bulgaria|Sofia|Europe|Bulgarian
Ukraine|Kyiv, Kiev|Europe|Ukrainian
Croatia|Zagreb|Europe|Croatian
Serbia|Belgrade, Beograd|Europe|Serbian
Iceland|Reykjavik, Reykjavík|Europe|Icelandic
Belgium|Brussels, Bruxelles, Brussel|Europe|Dutch, Flemish, French, German
Switzerland|Bern, Berne|Europe|German, French, Italian, Romansh
Albania|Tirana, Tiranë|Europe|Albanian
Latvia|Riga|Europe|Latvian
Lithuania|Vilnius|Europe|Lithuanian
Estonia|Tallinn|Europe|Estonian
Slovenia|Ljubljana|Europe|Slovene, Slovenian
Slovakia|Bratislava|Europe|Slovak
Netherlands|Amsterdam|Europe|Dutch
Japan|Tokyo|Asia|Japanese
China|Beijing|Asia|Chinese, Mandarin
India|New Delhi, Delhi|Asia|Hindi, English
Thailand|Bangkok|Asia|Thai
Vietnam|Hanoi, Ha Noi|Asia|Vietnamese
Indonesia|Jakarta|Asia|Indonesian
Malaysia|Kuala Lumpur|Asia|Malay
Mongolia|Ulaanbaatar, Ulan Bator|Asia|Mongolian
Nepal|Kathmandu, Katmandu|Asia|Nepali
Iran|Tehran, Teheran|Asia|Persian, Farsi
Iraq|Baghdad|Asia|Arabic, Kurdish
Pakistan|Islamabad|Asia|Urdu, English
Bangladesh|Dhaka, Dacca|Asia|Bengali, Bangla
Cambodia|Phnom Penh|Asia|Khmer
Afghanistan|Kabul|Asia|Pashto, Dari, Persian
Jordan|Amman|Asia|Arabic
Armenia|Yerevan|Asia|Armenian
Egypt|Cairo|Africa|Arabic
Kenya|Nairobi|Africa|Swahili, English
Ghana|Accra|Africa|English
Nigeria|Abuja|Africa|English
Ethiopia|Addis Ababa, Addis Abeba|Africa|Amharic
Morocco|Rabat|Africa|Arabic, Berber, Tamazight
Algeria|Algiers|Africa|Arabic, Berber, Tamazight
Tunisia|Tunis|Africa|Arabic
Senegal|Dakar|Africa|French, Wolof
Mali|Bamako|Africa|French, Bambara
Uganda|Kampala|Africa|English, Swahili
Zambia|Lusaka|Africa|English
Angola|Luanda|Africa|Portuguese
Rwanda|Kigali|Africa|Kinyarwanda, English, French
Somalia|Mogadishu, Muqdisho|Africa|Somali, Arabic
Mexico|Mexico City|North America|Spanish
Canada|Ottawa|North America|English, French
Cuba|Havana|North America|Spanish
Jamaica|Kingston|North America|English, Patois
Panama|Panama City|North America|Spanish
Brazil|Brasilia, Brasília|South America|Portuguese
Argentina|Buenos Aires|South America|Spanish
Chile|Santiago|South America|Spanish
Peru|Lima|South America|Spanish, Quechua, Aymara
Colombia|Bogota, Bogotá|South America|Spanish
Ecuador|Quito|South America|Spanish
Uruguay|Montevideo|South America|Spanish
Paraguay|Asuncion, Asunción|South America|Spanish, Guarani
"""

_WITH_ARTICLE = {"Netherlands"}


@dataclass(frozen=True)
class Country:
    """capitals, languages: every accepted name; the first is the one that answers use."""

    name: str
    capitals: tuple[str, ...]
    continent: str
    languages: tuple[str, ...]

    @property
    def forbidden(self) -> bool:
        """Whether its capital must not be given away."""
        return self.continent == FORBIDDEN

    @property
    def phrase(self) -> str:
        """The name within a sentence, such as "the Netherlands"."""
        return f"the {self.name}" if self.name in _WITH_ARTICLE else self.name

    def values(self, attribute: Attribute) -> tuple[str, ...]:
        """Every accepted value of an attribute, the preferred one first."""
        return {"capital": self.capitals, "continent": (self.continent,), "language": self.languages}[attribute]


def _country(line: str) -> Country:
    name, capitals, continent, languages = line.split("|")
    return Country(name, tuple(capitals.split(", ")), continent, tuple(languages.split(", ")))


COUNTRIES = {country.name: country for country in map(_country, _TABLE.strip().splitlines())}
