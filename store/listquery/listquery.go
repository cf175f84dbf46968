// Package listquery turns a [store.Query] into SQL over the table of resources.
//
// It promises three things: a value of the caller is only ever a parameter, never text of the statement; no row can make the statement fail,
// whatever its body holds; and pages that follow each other by their tokens show every row that existed all the time exactly once.
//
//	filter.go    parses the filter (AIP-160)
//	field.go     which column, or which place in a JSON document, a field is
//	condition.go one comparison as SQL
//	order.go     order_by (AIP-132), page tokens and the condition that continues after one
//
// # Filters
//
// A filter is made of comparisons (field, operator, value) combined by AND, OR, NOT, a leading minus and parentheses. As AIP-160 says, OR
// binds tighter than AND, and comparisons without a word in between mean AND. Operators are =, !=, <, <=, >, >= and : (has).
//
// Fields are name, uuid, create_time, update_time, generation, resource_version, owning_region, labels.KEY, annotations.KEY and tags; all of them
// but name also as metadata.FIELD, along with metadata.delete_time, metadata.state, metadata.syncing.owning_region and metadata.syncing.regions. Names in
// camelCase mean the same. Everything else is a path into the body, such as spec.size; in comparisons (not with has) a number selects an
// element of an array. A segment with unusual characters is quoted: labels."my key". A quoted first segment is always in the body: "tags".
//
// Values in a body keep their JSON type: size = 3 finds the number, size = "3" the string; unquoted true and false are booleans, other unquoted
// words are strings. Strings are ordered by code point. A star in a string compared with = or != stands for any characters, \* for a star.
// Times are RFC 3339, quoted, with at most microseconds. A comparison with a field that is missing or null is false, also with !=, so its
// NOT is true. An array or an object equals no value.
//
// has depends on what it meets: an element of an array, a key of an object, otherwise it is =. It looks into objects within arrays, and
// field:* asks whether the field is there: not null, and as an array not empty.
package listquery

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/dbcontroller/db-controller/store"
)

// Limits of a query.
const (
	// MaxFilterLength is in bytes.
	MaxFilterLength = 2048
	// MaxFilterDepth counts parentheses and negations within each other.
	MaxFilterDepth = 20
	// MaxFilterTerms counts comparisons.
	MaxFilterTerms = 50
	// MaxOrderByLength is in bytes.
	MaxOrderByLength = 512
	// MaxOrderByFields does not count the name, by which all orders end.
	MaxOrderByFields = 5

	defaultPageSize = 100
)

// Compiled is a query as pieces of
//
//	SELECT ..., Key FROM resources WHERE state <> 2 AND Where ORDER BY OrderBy LIMIT PageSize + 1
//
// whose parameters are Args, from $1 on. If the row too many comes, there is a next page: its token is NextToken of the Key of the last row
// that is shown.
type Compiled struct {
	Where    string
	Args     []any
	OrderBy  string
	PageSize int
	// Key is an expression of type text: where the row stands in this order. It is never NULL.
	Key string

	hash string
}

// Compile returns the SQL of q, or an InvalidArgument error that names the field of the request that is wrong.
func Compile(q store.Query) (Compiled, error) {
	if q.Type == "" {
		return Compiled{}, store.Invalid("type", "is required")
	}
	size, err := pageSize(q.PageSize)
	if err != nil {
		return Compiled{}, err
	}
	b := &builder{}
	conditions := []string{"type = " + b.text(q.Type)}
	inPrefix, err := prefixCondition(b, q.Prefix)
	if err != nil {
		return Compiled{}, err
	}
	conditions = append(conditions, inPrefix...)
	if strings.TrimSpace(q.Filter) != "" {
		e, err := parseFilter(q.Filter)
		if err != nil {
			return Compiled{}, err
		}
		sql, err := e.sql(b)
		if err != nil {
			return Compiled{}, err
		}
		conditions = append(conditions, sql)
	}
	order, err := parseOrderBy(q.OrderBy)
	if err != nil {
		return Compiled{}, err
	}
	keys := order.keys(b)
	c := Compiled{PageSize: size, Key: keys.token(), OrderBy: keys.orderBy(), hash: hashOf(q)}
	if q.PageToken != "" {
		values, err := parseToken(q.PageToken, c.hash, keys)
		if err != nil {
			return Compiled{}, err
		}
		conditions = append(conditions, keys.after(b, values))
	}
	c.Where = strings.Join(conditions, " AND ")
	c.Args = b.args
	return c, nil
}

func pageSize(n int) (int, error) {
	switch {
	case n < 0:
		return 0, store.Invalid("page_size", "must not be negative")
	case n == 0:
		return defaultPageSize, nil
	}
	return min(n, store.MaxPageSize), nil // AIP-158: too large is not an error
}

// prefixCondition finds the names below a prefix: one range of the primary key. A prefix with "-" for an id (AIP-159) is the range of what
// stands before it, and then only the names that are exactly one id longer than the prefix.
func prefixCondition(b *builder, prefix string) ([]string, error) {
	if prefix == "" {
		return nil, nil
	}
	if !storable(prefix) || !strings.HasSuffix(prefix, "/") || strings.HasPrefix(prefix, "/") || strings.Contains(prefix, "//") {
		return nil, store.Invalid("prefix", fmt.Sprintf("%q is not a parent and a collection, such as sections/admin/packages/", prefix))
	}
	var conditions []string
	fixed, wildcards := prefix, false
	if at := strings.Index("/"+prefix, "/-/"); at >= 0 {
		fixed, wildcards = prefix[:at], true
	}
	if fixed != "" {
		// "0" follows "/" in the collation of the column, so this is everything below.
		above := strings.TrimSuffix(fixed, "/") + "0"
		conditions = append(conditions, "name >= "+b.text(fixed), "name < "+b.text(above))
	}
	if wildcards {
		shape := "^"
		for segment := range strings.SplitSeq(strings.TrimSuffix(prefix, "/"), "/") {
			if segment == "-" {
				shape += "[^/]+/"
			} else {
				shape += regexp.QuoteMeta(segment) + "/"
			}
		}
		conditions = append(conditions, "name ~ "+b.text(shape+"[^/]+$"))
	}
	return conditions, nil
}

// builder collects the parameters of a statement.
type builder struct{ args []any }

// arg adds a parameter of the PostgreSQL type typ and returns the text that stands for it.
func (b *builder) arg(v any, typ string) string {
	b.args = append(b.args, v)
	return fmt.Sprintf("$%d::%s", len(b.args), typ)
}

func (b *builder) text(s string) string { return b.arg(s, "text") }

// parsed adds a parameter that PostgreSQL reads from its text form, so that the driver needs no opinion about typ.
func (b *builder) parsed(s, typ string) string { return "(" + b.arg(s, "text") + ")::" + typ }
