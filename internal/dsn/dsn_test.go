package dsn

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for _, good := range []string{
		"postgres://u:p@h:5432/db", "postgres://u:p%40x%2Fy@h/db?sslmode=disable", "host=/run/postgresql user=u", "host=@abstract user=u", "postgres://u@h1:1,h2:2/db", "",
	} {
		if _, err := Parse(good); err != nil {
			t.Errorf("Parse(%q) = %v", good, err)
		}
	}
	const secret = "s3cr3t"
	for situation, bad := range map[string]string{
		"a slash in the password":         "postgres://u:x/" + secret + "@h:5432/db",
		"an at sign in the password":      "postgres://u:x@" + secret + "@h:5432/db",
		"the same with several hosts":     "postgres://u:x@" + secret + "@h1:1,h2:2/db",
		"a percent sign in the password":  "postgres://u:" + secret + "%zz@h/db",
		"a port that is the password":     "postgres://h:" + secret + "/db",
		"pairs without a quote at an end": "host=h password='" + secret,
		"pairs with a bad port":           "host=h port=five password=" + secret,
	} {
		t.Run(situation, func(t *testing.T) {
			if _, err := Parse(bad); err == nil || strings.Contains(err.Error(), secret) {
				t.Errorf("Parse = %v, want an error without the password", err)
			}
		})
	}
}
