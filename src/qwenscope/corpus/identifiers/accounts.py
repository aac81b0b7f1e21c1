"""User names: the name in a profile's address, and @handles whose neighbourhood says that they are accounts."""

from __future__ import annotations

import re

from qwenscope.corpus.identifiers.rules import Rule, Span, after, after_words, before, cue, where

_PROFILES = re.findall(
    r"\S+",
    """
github.com/ gitlab.com/ bitbucket.org/ huggingface.co/ twitter.com/ x.com/ instagram.com/ facebook.com/ fb.com/
threads.net/@ tiktok.com/@ youtube.com/@ youtube.com/c/ youtube.com/user/ youtube.com/channel/ linkedin.com/in/
reddit.com/u/ reddit.com/user/ medium.com/@ t.me/ telegram.me/ vk.com/ ok.ru/profile/ weibo.com/u/ weibo.com/n/
zhihu.com/people/ space.bilibili.com/ twitch.tv/ pinterest.com/ soundcloud.com/ snapchat.com/add/ steamcommunity.com/id/
steamcommunity.com/profiles/ stackoverflow.com/users/ orcid.org/ paypal.me/ venmo.com/u/ venmo.com/ cash.app/$
ko-fi.com/
patreon.com/ linktr.ee/ about.me/ keybase.io/ kaggle.com/ behance.net/ dribbble.com/ flickr.com/people/ last.fm/user/
bsky.app/profile/ npmjs.com/~ news.ycombinator.com/user?id= facebook.com/profile.php?id= line.me/ti/p/~
mastodon.social/@
""",
)
_OPEN = frozenset(  # hosts whose first part of the path is a person only when nothing follows
    re.findall(r"\S+", "github.com gitlab.com bitbucket.org huggingface.co kaggle.com")
)
_NO_NAMES = frozenset(
    re.findall(
        r"\S+",
        """about account accounts api app apps assets blog business careers channel collections company contact datasets
    developer developers discover docs download enterprise events example explore favicon.ico features gaming groups
    hashtag
    help home i images index.html intent issues jobs join legal live login logout marketplace messages mobile models
    news
    notifications organizations orgs p pages papers people photo.php plans pricing privacy profile pulls reel reels r
    robots
    search security settings share sharer sharer.php shop shorts signup sitemap sponsors spaces status stories
    support tasks
    team terms topics tos trending tv user username users video videos watch yourname yourusername your_username
    your-username""",
    )
)
_PATHS_OF_HOST: dict[str, list[str]] = {}
for _address in _PROFILES:
    _host, _, _path = _address.partition("/")
    _PATHS_OF_HOST.setdefault(_host, []).append(_path)
for _paths in _PATHS_OF_HOST.values():
    _paths.sort(key=len, reverse=True)  # profile.php?id= before whatever follows the host
_SLASH = re.compile(r"\.[A-Za-z]{2,6}/")
_NAME = re.compile(r"(?:%[0-9A-F]{2}|[0-9A-Za-z_\-])(?:(?:%[0-9A-F]{2}|[\w.\-]){0,62}(?:%[0-9A-F]{2}|\w))?", re.ASCII)
_HANDLE = re.compile(
    r"(?<![0-9A-Za-z_@./`\\{\"'<*])@([A-Za-z0-9_](?:[A-Za-z0-9_.]{0,38}[A-Za-z0-9_]))(?![@(0-9A-Za-z_/=])"
)
_SITES = (
    r"(?:twitter|instagram|telegram|tiktok|facebook)[a-z]{0,3}|insta|ig|snap(?:chat)?|threads|mastodon|bluesky|twitch|discord|youtube|github|"
    r"linkedin|venmo|reddit|line id|wechat|kik"
)
_BEFORE = cue(
    rf"(?<![A-Za-z])(?:{_SITES}|follow(?:ing|ed)?|tweet(?:s|ed)?|retweet(?:ed)?|rt|dm|dms|handle|user ?name"
    rf"|nick(?:name)?|"
    r"account|message|contact|tagged|seguir|s[ií]g[ue]\w*|siga|suivez|folgt?|usuario|cuenta|compte|konto"
    r"|perfil)(?![A-Za-z])[^\n@(){};]{0,24}(?: \()?$"
    r"|(?:推特|微博|关注|關注|フォロー|ツイッター|インスタ|телеграм|инстаграм|твиттер|подпи|підпи|ник|аккаунт|팔로우|인스타|트위터|"
    r"تويتر|انستغرام|تابع|إنستغرام|טוויטר|אינסטגרם|עקבו|ट्विटर|इंस्टा|फॉलो|ทวิตเตอร์|ไอจี|อินสตา"
    r"|ติดตาม)[^\n@(){};]{0,24}(?: \()?$"
)
_AFTER = re.compile(
    rf"^[ ,]{{0,2}}\(?(?:on|at|auf|en|sur|no|via|в|в) (?:{_SITES})\b|^ ?を?フォロー|^ ?팔로우", re.IGNORECASE
)


_CODE_AFTER = re.compile(
    r"\W{0,2}(?:annotat|decorat|directive|propert|param|tag\b|rule\b|注解|装饰器|декоратор)", re.IGNORECASE
)
_REDDITOR = re.compile(r"(?<![\w/.:])/?u/([A-Za-z0-9_\-]{3,20})(?![\w/\-])", re.ASCII)
_LABELS = tuple(
    re.findall(r"\S+", "stagram itter legram iktok ebook napchat iscord insta Insta INSTA IG ithub itHub wechat WeChat")
)
_AFTER_LABEL = re.compile(  # a name is told from a word by its digit, dot or underscore
    rf"(?<![A-Za-z])(?i:{_SITES})(?i: handle| id| username| account)? ?: ?"
    r"(?=[A-Za-z0-9]{0,30}[0-9._])([A-Za-z0-9](?:[\w.]{1,38}\w))(?![\w@/:]|\.\w)",
    re.ASCII,
)


def _profile(match: re.Match[str]) -> Span | None:
    text, end = match.string, match.end()
    address = re.search(r"[0-9a-z.\-]{1,40}$", text[max(0, end - 40) : end - 1].lower())
    host = address[0] if address else ""
    paths = _PATHS_OF_HOST.get(host) or _PATHS_OF_HOST.get(host.partition(".")[2]) or []
    for path in paths:
        name = _NAME.match(text, end + len(path)) if text[end : end + len(path)].lower() == path else None
        if name is None or name[0].lower() in _NO_NAMES:
            continue
        if host in _OPEN and re.compile(r"/[\w.\-]").match(text, name.end()):
            continue
        return name.span()
    return None


def _handle(match: re.Match[str]) -> Span | None:
    if match[1].lower() in _NO_NAMES or match[1].lower().startswith("your") or match[1].isdecimal():
        return None
    if _CODE_AFTER.match(after(match)):
        return None
    return match.span() if _BEFORE.search(before(match)) or _AFTER.match(after(match)) else None


def _named(match: re.Match[str]) -> Span | None:
    name = match[1].lower()
    return None if name in _NO_NAMES or name.startswith("your") else match.span(1)


RULES = (
    Rule("USERNAME", after_words(("u/",), 3), _REDDITOR, _named),
    Rule("USERNAME", after_words(_LABELS, 12), _AFTER_LABEL, _named),
    Rule("USERNAME", where(_SLASH.pattern), _SLASH, _profile),
    Rule("USERNAME", where(r"@\w"), _HANDLE, _handle),
)
