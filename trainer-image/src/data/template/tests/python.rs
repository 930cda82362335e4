//! What of Jinja is Python's: each rendering is that of transformers.

use super::*;

#[test]
fn jinja_is_that_of_python() {
    for (source, expected) in [
        ("{{ none }} {{ true }} {{ ['a', 1.0, none] }} {{ {'a': false} }}", "None True ['a', 1.0, None] {'a': False}"),
        ("{{ true | string ~ 1 }}", "True1"),
        ("{{ 'a' is iterable }}{{ 'a' is sequence }}{{ 1 is iterable }}", "TrueTrueFalse"),
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "13"),
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "1"),
        ("{{ {'b': 'é', 'a': [1]} | tojson(ensure_ascii=true, separators=(',', ':')) }}", r#"{"b":"\u00e9","a":[1]}"#),
        ("{{ {'a': [1]} | tojson(indent=2) }}", "{\n  \"a\": [\n    1\n  ]\n}"),
        ("{{ 'abc'[0] }}{{ 'abc'[-1] }}{{ 'abc'[::-1] }}{{ [1, 2][::-1] }}", "accba[2, 1]"),
        ("a\r\nb{{ 'c\r\nd' }}\r", "a\nbc\nd"),
        ("{{ [1] + ['a'] }}{{ {'a': 1}.items() | list }}", "[1, 'a'][('a', 1)]"),
        ("{{ none is iterable }}{{ nope is iterable }}{{ nope | length }}{{ 'é' | count }}", "FalseTrue01"),
        (
            "{{ 'a,b,c'.rsplit(',', 1) }}{{ ' a  b '.rsplit() }}{{ '  a b'.rsplit(maxsplit=1) }}",
            "['a,b', 'c']['a', 'b']['  a', 'b']",
        ),
        (
            "{{ 'a-b-c'.partition('-') | join('|') }}{{ 'a-b-c'.rpartition('-')[0] }}{{ 'ab'.partition('-')[0] }}",
            "a|-|b-ca-bab",
        ),
        ("{{ 'abc'.removeprefix('a') }}{{ 'abc'.removesuffix('c') }}{{ 'abc'.removesuffix('x') }}", "bcababc"),
        ("{# {% generation %} #}{# a #}a{% if true %}b{% endif %}", "ab"),
    ] {
        assert_eq!(text(source, &long()), expected, "{source}");
    }
}

#[test]
fn texts_are_handled_as_in_python() {
    for (source, expected) in [
        (r#"{{ "o'neil mc-donald a_b (x"|title }}"#, "O'neil Mc-Donald A_b (X"),
        (r#"{{ "o'neil x9y ÉCOLE a_b".title() }}"#, "O'Neil X9Y École A_B"),
        ("{{ 2.5|round }} {{ 3.5|round }} {{ 0.125|round(2) }} {{ 7|round }} {{ -2.5|round }}", "2.0 4.0 0.12 7 -2.0"),
        ("{{ 'a b' is lower }}{{ 'A 1' is upper }}{{ '1' is lower }}{{ 'aB' is lower }}", "TrueTrueFalseFalse"),
        (
            "{{ '\\u001cx\\u001f'.strip() }}|{{ ' \\u001fx'|trim }}|{{ 'xax'|trim('x') }}|{{ 'xa'.lstrip('x') }}",
            "x|x|a|a",
        ),
        ("{{ ' a\\u001cb '.split() }}{{ 'a b  c '.split(maxsplit=1) }}", "['a', 'b']['a', 'b  c ']"),
        (
            "{{ ' a b'.split(none) }}{{ 'a,,b'.split(sep=',') }}{{ 'a,b,c'.split(',', 1) }}{{ ''.split(',') }}{{ ''.split() }}",
            "['a', 'b']['a', '', 'b']['a', 'b,c'][''][]",
        ),
        (
            "{{ ''.isspace() }}{{ ''.isdigit() }}{{ ''.isalpha() }}{{ 'a b'.islower() }}{{ 'A1'.isupper() }}",
            "FalseFalseFalseTrueTrue",
        ),
        (
            "{{ 'a\\u0085b\\u2028c\\u000bd\\r\\ne\\n'.splitlines() }}{{ 'a\\r\\nb'.splitlines(true) }}{{ ''.splitlines() }}",
            "['a', 'b', 'c', 'd', 'e']['a\\r\\n', 'b'][]",
        ),
        ("{{ ['é\\u00ad\\u00a0\\u2028\\ue000', nope] }}", "['é\\xad\\xa0\\u2028\\ue000', Undefined]"),
    ] {
        assert_eq!(text(source, &long()), expected, "{source}");
    }
}

#[test]
fn tuples_are_no_lists() {
    for (source, expected) in [
        ("{{ (1, 2) }} {{ (1,) }} {{ () }} {{ (1) }} {{ [(1, 'a')] }}", "(1, 2) (1,) () 1 [(1, 'a')]"),
        ("{{ (1, 2)|string }}{{ (1, 2) | tojson }}{{ ((1, 2), (3 + 4) * 2) }}", "(1, 2)[1, 2]((1, 2), 14)"),
        (
            "{{ {'a': 1}.items() | list }}{{ {'a': 1} | dictsort }}{{ {'a': 1} | items | list }}",
            "[('a', 1)][('a', 1)][('a', 1)]",
        ),
        (
            "{{ {'a': 1}.items() }}{{ {'a': 1}.keys() }}{{ {'a': 1}.values() }}",
            "dict_items([('a', 1)])dict_keys(['a'])dict_values([1])",
        ),
        (
            "{{ {}.items() }}{{ {'b': 1, 'a': 2}.keys() | list }}{{ 'a' in {'a': 1}.keys() }}",
            "dict_items([])['b', 'a']True",
        ),
        ("{% for (a, b) in [(1, 2)] %}{{ a }}{{ b }}{% endfor %}{% set (a, b) = (3, 4) %}{{ a }}{{ b }}", "1234"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{{ loop.last }}{% endfor %}", "a1True"),
        (
            "{{ 1 in (1, 2) }}{{ 3 not in (1, 2) }}{{ 'ab'.startswith(('x', 'a')) }}{{ (1, 2)[0] }}{{ (1, 2) | length }}",
            "TrueTrueTrue12",
        ),
        (
            "{{ (1, 2)[-1] }}{{ (1, 2, 3)[1:] | list }}{{ (1, 2) | join('-') }}{{ (1, 2) is sequence }}",
            "2[2, 3]1-2True",
        ),
        (
            "{% macro f(a, b=(1, 2)) %}{{ a }}{{ b }}{% endmacro %}{{ f((3, 4)) }}{{ range(0, 3) | list }}",
            "(3, 4)(1, 2)[0, 1, 2]",
        ),
        (
            "{{ '(1, 2)' }}(1, 2){# (1, 2) #}{% raw %}{{ (1, 2) and 0 }}{% endraw %}{{ 'a, (b' }}",
            "(1, 2)(1, 2){{ (1, 2) and 0 }}a, (b",
        ),
        ("{% if (messages[0].role == 'user' and (1 or 2)) %}x{% endif %}{{ {'a': (1, 2)} }}", "x{'a': (1, 2)}"),
        ("{{ {'a': {'b': 1}}}}{{ '}}' }}{{ '%}' }}{{ '{%' ~ '{{' }}", "{'a': {'b': 1}}}}%}{%{{"),
    ] {
        assert_eq!(text(source, &long()), expected, "{source}");
    }
}

#[test]
fn and_gives_its_operand() {
    for (source, expected) in [
        ("{{ 0 and 1 }}|{{ none and 1 }}|{{ '' and 'x' }}|{{ 1 and 2 }}|{{ 0 or none }}", "0|None||2|None"),
        ("{{ [] and not true }}{{ {} and 1 }}{{ 1 and 0 and 2 }}{{ nope and 1 }}{{ 'and' }}", "[]{}0and"),
        ("{{ true and 'a' or 'b' }}{{ false and 'a' or 'b' }}", "ab"),
    ] {
        assert_eq!(text(source, &long()), expected, "{source}");
    }
}

#[test]
fn filters_that_python_has_otherwise_are_refused_by_name() {
    for (filter, source) in [("attr", "{{ messages[0] | attr('role') }}"), ("pprint", "{{ messages | pprint }}")] {
        assert!(error(source, &long()).contains(&format!("filter {filter} is unknown")));
    }
}
