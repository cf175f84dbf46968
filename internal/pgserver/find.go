package pgserver

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
)

// Supported major versions, the oldest first.
const (
	oldestMajor = 15
	newestMajor = 18
)

// ErrNotInstalled is returned by Find and Start when this machine has no
// suitable PostgreSQL.
var ErrNotInstalled = errors.New("PostgreSQL is not installed")

// Find returns the folder that holds initdb and postgres of the wanted major
// version ("15" to "18"), or of any supported one when version is empty.
//
// It looks at $DBC_POSTGRES_BIN, the folders of Debian's packages, $PATH and
// the project's cache (see CacheDir), in this order; within a place the newest
// version wins. The error matches ErrNotInstalled when there is none.
func Find(version string) (string, error) {
	if version != "" {
		if n, err := strconv.Atoi(version); err != nil || n < oldestMajor || n > newestMajor {
			return "", fmt.Errorf("PostgreSQL version %q: want a major version from %d to %d, or none for any",
				version, oldestMajor, newestMajor)
		}
	}
	// A folder that was named on purpose must not be passed over in silence.
	if bin := os.Getenv("DBC_POSTGRES_BIN"); bin != "" {
		major, err := majorOf(bin)
		if err != nil {
			return "", fmt.Errorf("DBC_POSTGRES_BIN: %w", err)
		}
		if suits(major, version) {
			return bin, nil
		}
	}

	var bins []string
	add := func(pattern string) {
		found, _ := filepath.Glob(pattern) // only a bad pattern is an error
		slices.SortFunc(found, func(a, b string) int { return cmp.Compare(numberIn(b), numberIn(a)) })
		bins = append(bins, found...)
	}
	add("/usr/lib/postgresql/*/bin")
	if path, err := exec.LookPath("postgres"); err == nil {
		bins = append(bins, filepath.Dir(path))
	}
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	add(filepath.Join(cache, "postgres", "*", "bin"))

	for _, bin := range bins {
		if major, err := majorOf(bin); err == nil && suits(major, version) {
			return bin, nil
		}
	}
	return "", fmt.Errorf("%w: no initdb and postgres of version %s in $DBC_POSTGRES_BIN, /usr/lib/postgresql, $PATH or %s; run `make deps`",
		ErrNotInstalled, cmp.Or(version, fmt.Sprintf("%d to %d", oldestMajor, newestMajor)), filepath.Join(cache, "postgres"))
}

// CacheDir returns the folder for what the project installs for itself:
// $DBC_CACHE, or db-controller in the user's cache folder. Root's default is
// /var/cache/db-controller, because the user that PostgreSQL runs as cannot
// look into root's home.
func CacheDir() (string, error) {
	if dir := os.Getenv("DBC_CACHE"); dir != "" {
		return dir, nil
	}
	if os.Geteuid() == 0 {
		return "/var/cache/db-controller", nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache folder: %w; set DBC_CACHE", err)
	}
	return filepath.Join(dir, "db-controller"), nil
}

func suits(major int, version string) bool {
	if version == "" {
		return major >= oldestMajor && major <= newestMajor
	}
	return strconv.Itoa(major) == version
}

var versionOutput = regexp.MustCompile(`^postgres \(PostgreSQL\) (\d+)`)

// majorOf returns the major version of the programs in bin.
func majorOf(bin string) (int, error) {
	if _, err := exec.LookPath(filepath.Join(bin, "initdb")); err != nil {
		return 0, fmt.Errorf("find initdb: %w", err)
	}
	out, err := exec.Command(filepath.Join(bin, "postgres"), "--version").Output()
	if err != nil {
		return 0, fmt.Errorf("ask postgres in %s for its version: %w", bin, err)
	}
	m := versionOutput.FindSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("version of postgres in %s: cannot read %q", bin, out)
	}
	return strconv.Atoi(string(m[1]))
}

// numberIn returns the version in a path like .../15/bin.
func numberIn(bin string) int {
	n, _ := strconv.Atoi(filepath.Base(filepath.Dir(bin))) // other names sort last
	return n
}
