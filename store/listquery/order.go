package listquery

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dbcontroller/db-controller/store"
)

// ordering is a parsed order_by; it always ends with the name, so that it is total.
type ordering []orderField

type orderField struct {
	field
	desc bool
}

func parseOrderBy(orderBy string) (_ ordering, err error) {
	defer func() { err = invalid("order_by", orderBy, err) }()
	if len(orderBy) > MaxOrderByLength {
		return nil, store.Invalid("order_by", fmt.Sprintf("has %d bytes, at most %d are allowed", len(orderBy), MaxOrderByLength))
	}
	if !storable(orderBy) {
		return nil, store.Invalid("order_by", "must be UTF-8 without NUL")
	}
	name, _ := resolve(path{segments: []string{"name"}})
	if strings.TrimSpace(orderBy) == "" {
		return ordering{{field: name}}, nil
	}
	p := &parser{in: orderBy}
	var fields ordering
	for more := true; more; more = p.symbol(",") {
		p.space()
		at := p.pos
		if len(fields) == MaxOrderByFields {
			return nil, p.errorf(at, "more than %d fields", MaxOrderByFields)
		}
		path, err := p.path()
		if err != nil {
			return nil, err
		}
		f, reason := resolve(path)
		switch {
		case reason != "":
			return nil, p.errorf(at, "%s", reason)
		case f.collection:
			return nil, p.errorf(at, "%s holds several values, which have no order", f.name)
		case slices.ContainsFunc(fields, f.same):
			return nil, p.errorf(at, "%s is there twice", f.name)
		}
		p.space()
		at = p.pos
		direction := p.take(isPlain)
		if direction != "" && direction != "asc" && direction != "desc" {
			return nil, p.errorf(at, "expected desc or a comma after %s", f.name)
		}
		fields = append(fields, orderField{f, direction == "desc"})
	}
	if p.pos < len(p.in) {
		return nil, p.errorf(p.pos, "expected desc or a comma")
	}
	if i := slices.IndexFunc(fields, name.same); i >= 0 {
		return fields[:i+1], nil // names are unique: nothing after them matters
	}
	return append(fields, orderField{field: name}), nil
}

// same says whether o orders by f, whatever the spelling.
func (f field) same(o orderField) bool { return o.source == f.source && slices.Equal(o.path, f.path) }

// maxKeyText is how many characters of a string in a body count for the order. The rest would only make page tokens long.
const maxKeyText = 200

// sortKey is one expression to order by.
type sortKey struct {
	orderField
	sql string
}

type sortKeys []sortKey

// keys returns the expressions to order by. In a body strings come before numbers before booleans (jsonb's order); arrays, objects and null
// have no place and count as missing.
func (o ordering) keys(b *builder) sortKeys {
	keys := make(sortKeys, len(o))
	for i, f := range o {
		keys[i] = sortKey{f, f.source}
		switch {
		case f.kind == jsonField && f.text:
			keys[i].sql = "left(" + f.at(b) + " #>> '{}', " + strconv.Itoa(maxKeyText) + `) COLLATE "C"`
		case f.kind == jsonField:
			x := f.at(b)
			keys[i].sql = "CASE jsonb_typeof(" + x + ") WHEN 'string' THEN to_jsonb(left(" + x + " #>> '{}', " + strconv.Itoa(maxKeyText) + ")) " +
				"WHEN 'number' THEN " + x + " WHEN 'boolean' THEN " + x + " END"
		}
	}
	return keys
}

func (k sortKey) mayBeNull() bool { return k.nullable || k.kind == jsonField }

// orderBy puts what is missing last in both directions.
func (ks sortKeys) orderBy() string {
	parts := make([]string, len(ks))
	for i, k := range ks {
		parts[i] = k.sql
		if k.desc {
			parts[i] += " DESC"
		}
		if k.mayBeNull() {
			parts[i] += " NULLS LAST"
		}
	}
	return strings.Join(parts, ", ")
}

// token returns the expression of all keys of a row as one JSON array.
func (ks sortKeys) token() string {
	parts := make([]string, len(ks))
	for i, k := range ks {
		parts[i] = k.sql
		if k.kind == timeField {
			// A count of microseconds is exact and knows no time zone.
			parts[i] = "(extract(epoch FROM " + k.sql + ") * 1000000)::bigint"
		}
	}
	return "jsonb_build_array(" + strings.Join(parts, ", ") + ")::text"
}

// after is the condition for rows behind the row whose keys are values, where nil is NULL:
// greater in the first key, or equal in it and greater in the second, and so on.
func (ks sortKeys) after(b *builder, values []any) string {
	var cases []string
	equal := ""
	for i, k := range ks {
		if values[i] == nil { // nothing comes behind NULL
			equal += "(" + k.sql + ") IS NULL AND "
			continue
		}
		var v string
		switch k.kind {
		case timeField:
			v = b.arg(values[i], "timestamptz")
		case intField:
			v = b.arg(values[i], "bigint")
		case jsonField:
			if k.text {
				v = b.arg(values[i], "text")
			} else {
				v = b.parsed(values[i].(string), "jsonb")
			}
		default:
			v = b.arg(values[i], "text")
		}
		operator := " > "
		if k.desc {
			operator = " < "
		}
		behind := k.sql + operator + v
		if k.mayBeNull() {
			behind = "(" + behind + " OR (" + k.sql + ") IS NULL)"
		}
		cases = append(cases, equal+behind)
		equal += k.sql + " = " + v + " AND "
	}
	return "(" + strings.Join(cases, " OR ") + ")"
}

// A page token is base64url of: the version of its format, the hash of the query, and the JSON array of the keys.
const (
	tokenVersion = 1
	hashLength   = 12
	// maxToken is above what NextToken can return for numbers as long as PostgreSQL stores them.
	maxToken = 1 << 20
)

// hashOf ties a token to its query. It is no protection against forgery, which could only move the caller within what he may read anyway.
func hashOf(q store.Query) string {
	parts, _ := json.Marshal([]string{q.Type, q.Prefix, q.Filter, q.OrderBy}) // strings always have a JSON form
	sum := sha256.Sum256(parts)
	return string(sum[:hashLength])
}

// NextToken returns the token of the page behind the row whose Key is key.
func (c Compiled) NextToken(key string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(string(rune(tokenVersion)) + c.hash + key))
}

// parseToken returns the values of the keys, in the form that sortKeys.after expects. It trusts nothing: whatever it accepts, PostgreSQL accepts.
func parseToken(token, hash string, keys sortKeys) ([]any, error) {
	garbage := store.Invalid("page_token", "is not a token of this service: send back the next_page_token of the page before")
	if len(token) > maxToken {
		return nil, garbage
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(token)
	if err != nil || len(raw) < 1+hashLength || raw[0] != tokenVersion {
		return nil, garbage
	}
	if string(raw[1:1+hashLength]) != hash {
		return nil, store.Invalid("page_token", "belongs to another query: keep collection, filter and order_by the same for all pages")
	}
	var parts []json.RawMessage
	if err := json.Unmarshal(raw[1+hashLength:], &parts); err != nil || len(parts) != len(keys) {
		return nil, garbage
	}
	values := make([]any, len(parts))
	for i, part := range parts {
		var ok bool
		if values[i], ok = keyValue(keys[i], part); !ok {
			return nil, garbage
		}
	}
	return values, nil
}

func keyValue(k sortKey, part json.RawMessage) (any, bool) {
	d := json.NewDecoder(bytes.NewReader(part))
	d.UseNumber()
	var x any
	if d.Decode(&x) != nil {
		return nil, false
	}
	switch x := x.(type) {
	case nil:
		return nil, k.mayBeNull()
	case bool:
		return strconv.FormatBool(x), k.kind == jsonField && !k.text
	case string:
		if k.kind == jsonField && !k.text {
			quoted, _ := json.Marshal(x) // a string always has a JSON form
			return string(quoted), storable(x)
		}
		return x, (k.kind == textField || k.kind == jsonField) && storable(x)
	case json.Number:
		if k.kind == jsonField && !k.text {
			return x.String(), fitsNumeric(x.String())
		}
		n, err := strconv.ParseInt(x.String(), 10, 64)
		if k.kind == timeField {
			t := time.UnixMicro(n).UTC()
			return t, err == nil && t.Year() > 0 && t.Year() < 10000
		}
		return n, err == nil && k.kind == intField
	}
	return nil, false
}

// fitsNumeric says whether PostgreSQL can hold the number, in the form that it writes itself: without exponent.
func fitsNumeric(number string) bool {
	whole, fraction, _ := strings.Cut(number, ".")
	return !strings.ContainsAny(number, "eE") && len(whole) <= 131072 && len(fraction) <= 16383
}
