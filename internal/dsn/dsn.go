// Package dsn reads connection strings of PostgreSQL. Its errors repeat no part of them: a password may be anywhere in one that is misspelled.
package dsn

import (
	"errors"
	"strings"

	"github.com/jackc/pgx/v5/pgxpool"
)

var errUnreadable = errors.New("the DSN cannot be parsed: use postgres://user:password@host:port/database, with special characters of the password escaped (%40 for @), or key=value pairs")

// Parse reads a URL or key=value pairs.
func Parse(text string) (*pgxpool.Config, error) {
	c, err := pgxpool.ParseConfig(text)
	if err != nil {
		return nil, errUnreadable
	}
	// An @ in a password that is not escaped makes what follows it a part of the host, which errors of connections do tell. No host has one inside.
	hosts := []string{c.ConnConfig.Host}
	for _, f := range c.ConnConfig.Fallbacks {
		hosts = append(hosts, f.Host)
	}
	for _, h := range hosts {
		if strings.LastIndexByte(h, '@') > 0 { // at 0: a Unix socket without a file
			return nil, errUnreadable
		}
	}
	return c, nil
}
