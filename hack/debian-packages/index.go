package main

import (
	"bufio"
	"fmt"
	"io"
	"strings"
)

// stanza is one package of the index: its fields as they are there.
type stanza struct {
	name    string
	version string
	fields  map[string]string
}

// kept are the fields that resources are made of; the rest is not held in memory.
var kept = map[string]bool{
	"Architecture": true, "Priority": true, "Section": true, "Source": true, "Maintainer": true, "Homepage": true, "Description": true, "Essential": true,
	"Installed-Size": true, "Size": true, "Filename": true, "SHA256": true, "Tag": true,
	"Depends": true, "Pre-Depends": true, "Recommends": true, "Suggests": true,
	"Enhances": true, "Conflicts": true, "Breaks": true, "Replaces": true, "Provides": true,
}

// readIndex reads stanzas (deb822), by name. Of several versions of a package the highest stays.
func readIndex(r io.Reader) (map[string]*stanza, error) {
	packages := map[string]*stanza{}
	current := &stanza{fields: map[string]string{}}
	field := "" // that a continuation line belongs to; empty if it is not kept
	end := func() {
		if current.name != "" && current.version != "" {
			if old := packages[current.name]; old == nil || compareVersions(current.version, old.version) > 0 {
				packages[current.name] = current
			}
		}
		current, field = &stanza{fields: map[string]string{}}, ""
	}
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 1<<16), 1<<24)
	number := 0
	for lines.Scan() {
		number++
		line := strings.TrimRight(strings.ToValidUTF8(lines.Text(), "\uFFFD"), " \t\r")
		if line == "" {
			end()
			continue
		}
		if line[0] == ' ' || line[0] == '\t' {
			if field != "" {
				text := line[1:]
				if strings.TrimSpace(text) == "." { // how deb822 writes an empty line
					text = ""
				}
				current.fields[field] += "\n" + text
			}
			continue
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok {
			return nil, fmt.Errorf("read package index: line %d is neither a field nor its continuation: %.80q", number, line)
		}
		value = strings.TrimSpace(value)
		field = ""
		switch {
		case name == "Package":
			current.name = value
		case name == "Version":
			current.version = value
		case kept[name]:
			field = name
			current.fields[name] = value
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read package index behind line %d: %w", number, err)
	}
	end()
	return packages, nil
}

// clause is one dependency: any of the alternatives satisfies it.
type clause struct {
	text         string
	alternatives []string
}

// parseClauses reads a field such as: a (>= 1) | b:any, c [amd64].
func parseClauses(field string) []clause {
	var clauses []clause
	for text := range strings.SplitSeq(strings.ReplaceAll(field, "\n", " "), ",") {
		c := clause{text: strings.Join(strings.Fields(text), " ")}
		for a := range strings.SplitSeq(text, "|") {
			// The name ends before an architecture, a version, and restrictions.
			a = strings.TrimSpace(a)
			if i := strings.IndexAny(a, ": ([<"); i >= 0 {
				a = a[:i]
			}
			if a != "" {
				c.alternatives = append(c.alternatives, a)
			}
		}
		if len(c.alternatives) > 0 {
			clauses = append(clauses, c)
		}
	}
	return clauses
}
