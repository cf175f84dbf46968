package listquery

import (
	"encoding/json"
	"slices"
	"time"
)

// check refuses what can never be meant. It runs while parsing, so that the first fault of a filter is the one that is reported.
func (c comparison) check(p *parser) error {
	f, v := c.field, c.value
	if c.operator == ":" && v.present() {
		return nil
	}
	ordered := slices.Contains([]string{"<", "<=", ">", ">="}, c.operator)
	switch {
	case f.collection && c.operator != ":":
		return p.errorf(v.at, "%s holds several values: ask with %s:value", f.name, f.name)
	case ordered && v.like != "":
		return p.errorf(v.at, `a star stands for any characters only with = and !=; write \* in quotes for the star itself`)
	case ordered && f.kind == jsonField && !f.text && v.boolean():
		return p.errorf(v.at, "%s has no order: compare it with = or !=, or quote it", v.text)
	case f.kind == intField && !numberForm.MatchString(v.text):
		return p.errorf(v.at, "%s is compared with a number", f.name)
	case f.kind == timeField:
		t, err := time.Parse(time.RFC3339, v.text)
		if err != nil || t.UTC().Year() < 1 || t.UTC().Year() > 9999 {
			return p.errorf(v.at, `%s is compared with a time in quotes, such as "2030-01-31T12:00:00Z"`, f.name)
		}
		if t.Nanosecond()%1000 != 0 {
			return p.errorf(v.at, "times have at most microseconds")
		}
	}
	return nil
}

func (v value) boolean() bool { return !v.quoted && (v.text == "true" || v.text == "false") }

// sql returns the condition. It is IS TRUE of everything that may be NULL, so that NOT works on what is missing.
func (c comparison) sql(b *builder) (string, error) {
	f, v := c.field, c.value
	operator := c.operator
	if operator == "!=" {
		operator = "<>"
	}
	if f.kind == jsonField {
		return c.json(b, operator), nil
	}
	if operator == ":" {
		if v.present() {
			return "(" + f.source + " IS NOT NULL)", nil
		}
		operator = "=" // a column holds one value
	}
	var condition string
	switch f.kind {
	case textField:
		condition = textCondition(b, f.source, operator, v)
	case intField:
		condition = f.source + " " + operator + " " + b.parsed(v.text, "numeric")
	case timeField:
		t, err := time.Parse(time.RFC3339, v.text)
		if err != nil {
			return "", err // check has seen to it
		}
		condition = f.source + " " + operator + " " + b.arg(t, "timestamptz")
	}
	return "((" + condition + ") IS TRUE)", nil
}

// json is the condition on a place in a document.
func (c comparison) json(b *builder, operator string) string {
	f, v := c.field, c.value
	if operator != ":" {
		return "((" + jsonCondition(b, f.at(b), operator, v, f.text) + ") IS TRUE)"
	}
	if v.present() {
		return "EXISTS (SELECT FROM " + f.elements(b) + " WHERE v <> 'null')"
	}
	return "EXISTS (SELECT FROM " + f.elements(b) + " WHERE " + jsonCondition(b, "v", "=", v, f.text) +
		" OR jsonb_typeof(v) = 'object' AND v ? " + b.text(v.text) + ")"
}

// jsonCondition compares the jsonb expression x with v. Nothing in it can raise an error: jsonb values are compared as such, or as text once
// they are known to be strings.
func jsonCondition(b *builder, x, operator string, v value, asText bool) string {
	isNumber := !v.quoted && !asText && numberForm.MatchString(v.text)
	isBool := !asText && v.boolean()
	isString := "jsonb_typeof(" + x + ") = 'string'"
	unquoted := "(" + x + ` #>> '{}') COLLATE "C"`
	switch {
	case isNumber && operator != "=" && operator != "<>":
		return "jsonb_typeof(" + x + ") = 'number' AND " + x + " " + operator + " " + b.parsed(v.text, "jsonb")
	case isNumber, isBool:
		return equality(x, operator, b.parsed(v.text, "jsonb"))
	case v.like != "" && operator == "<>":
		return x + " <> 'null' AND NOT (" + isString + " AND " + unquoted + " LIKE " + b.text(v.like) + ")"
	case v.like == "" && (operator == "=" || operator == "<>"):
		quoted, _ := json.Marshal(v.text) // a string always has a JSON form
		return equality(x, operator, b.parsed(string(quoted), "jsonb"))
	}
	return isString + " AND " + textCondition(b, unquoted, operator, v)
}

// equality takes care that null is unequal to nothing, as if it were missing.
func equality(x, operator, y string) string {
	if operator == "<>" {
		return x + " <> 'null' AND " + x + " <> " + y
	}
	return x + " = " + y
}

// textCondition compares the text expression x, whose collation is C, with v.
func textCondition(b *builder, x, operator string, v value) string {
	switch {
	case v.like == "":
		return x + " " + operator + " " + b.text(v.text)
	case operator == "<>":
		return x + " NOT LIKE " + b.text(v.like)
	}
	return x + " LIKE " + b.text(v.like)
}
