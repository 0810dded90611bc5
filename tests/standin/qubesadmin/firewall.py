# SPDX-License-Identifier: GPL-2.0-or-later
"""client: qubesadmin/firewall.py. A rule is text in one order, however it was given."""

ORDER = ("action", "proto", "dsthost", "dst4", "dst6", "dstports", "icmptype", "specialtarget",
         "expire", "comment")  # fmt: skip


class Rule:
    def __init__(self, rule):
        options, _, comment = rule.partition("comment=")
        given = dict(option.split("=", 1) for option in options.split(" ") if option)
        if comment:
            given["comment"] = comment
        unknown = set(given) - set(ORDER)
        if unknown:
            raise ValueError(f"Unknown rule elements: {unknown}")
        if given.get("action") not in ("accept", "drop"):
            raise ValueError("missing action=")
        if "dstports" in given and given.get("proto") not in ("tcp", "udp"):
            raise ValueError("dstports valid only for 'tcp' and 'udp' protocols")
        self.rule = " ".join(f"{key}={given[key]}" for key in ORDER if key in given)
