package security

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/dbcontroller/db-controller/apiserver"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/store"
)

// What must be seen nowhere: a password, and what is in a row.
const (
	canaryPassword = "cAnArY-pAsSwOrD-4711"
	canaryRow      = "cAnArY-rOw-0815"
)

// clean fails the test if a secret is in what people and programs may read. PEM keys are found by their first line.
func clean(t *testing.T, what, text string) {
	t.Helper()
	for _, secret := range []string{canaryPassword, url.QueryEscape(canaryPassword), canaryPassword[:12], canaryRow, "PRIVATE KEY"} {
		if i := strings.Index(text, secret); i >= 0 {
			t.Errorf("%s has %q: ...%s...", what, secret, text[max(0, i-300):min(len(text), i+100)])
		}
	}
}

// S8: errors of opening a Deployment are logged, are in /statusz and become conditions. None has the password, however the connection string is wrong.
func TestErrorsOfConnectionStrings(t *testing.T) {
	t.Parallel()
	pg := pgtest.Server(t, pgserver.Config{TCP: true})
	check(t, pg.CreateDatabase(t.Context(), "packages"))
	good, err := pg.TCPDSN(pg.Addr(), "packages")
	check(t, err)
	u, err := url.Parse(good)
	check(t, err)
	u.User = url.UserPassword(u.User.Username(), canaryPassword)
	wrongPassword := u.String()
	tls := *u
	tls.RawQuery = "sslmode=verify-full"
	nowhere := *u
	nowhere.Host = "127.0.0.1:1"
	w := newWorld(t, config{only: []key{}})
	for situation, dsn := range map[string]string{
		"a wrong password":              wrongPassword,
		"no TLS where it is wanted":     tls.String(),
		"nobody listens":                nowhere.String(),
		"a slash in the password":       "postgres://u:x/" + canaryPassword + "@127.0.0.1:5432/db",
		"an at sign in the password":    "postgres://u:x@" + canaryPassword + "@127.0.0.1:5432/db",
		"a number sign in the password": "postgres://u:" + canaryPassword + "#@127.0.0.1:5432/db",
		"a percent sign":                "postgres://u:" + canaryPassword + "%zz@127.0.0.1:5432/db",
		"key=value pairs with a typo":   "host=127.0.0.1 port=five password=" + canaryPassword,
		"an unknown sslmode":            "host=127.0.0.1 sslmode=perhaps password='" + canaryPassword + "'",
		"a password where the host is":  "postgres://127.0.0.1:" + canaryPassword + "/db",
		"a file that does not exist":    "host=127.0.0.1 sslmode=verify-ca sslrootcert=/nowhere password=" + canaryPassword,
	} {
		t.Run(situation, func(t *testing.T) {
			var log buffer
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			d, err := deployment.Open(ctx, deployment.Config{Key: packagesEU, Registry: w.registry, DSN: dsn, TLS: w.ca.source(t, identity(packagesEU)),
				Logger: slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
			if err == nil {
				d.Close()
				t.Fatal("it was opened")
			}
			clean(t, "the error", fmt.Sprintf("%v %+v %#v", err, err, asJSON(err)))
			for cause := err; cause != nil; cause = errors.Unwrap(cause) {
				clean(t, "its cause", cause.Error())
			}
			clean(t, "the log", log.String())
		})
	}
	t.Run("caches and search stores", func(t *testing.T) {
		var log buffer
		for _, bad := range []string{"redis://:" + canaryPassword + "@host:port/0", "http://u:" + canaryPassword + "@h", "redis://u:" + canaryPassword + "%zz@h", "host=x port=y password=" + canaryPassword} {
			d, err := deployment.Open(t.Context(), deployment.Config{Key: packagesEU, Registry: w.registry, DSN: pgtest.Database(t), CacheURL: bad, SearchURL: bad,
				TLS: w.ca.source(t, identity(packagesEU)), Logger: slog.New(slog.NewJSONHandler(&log, nil))})
			if err != nil {
				clean(t, "the error", err.Error())
				continue
			}
			clean(t, "the status", asJSON(d.Status()))
			d.Close()
		}
		if log.String() == "" {
			t.Error("nothing was logged")
		}
		clean(t, "the log", log.String())
	})
}

// panicking is a Store with faults that have a row in their text.
type panicking struct{ store.Store }

func (panicking) Get(_ context.Context, name string) (*store.Resource, error) {
	if strings.HasSuffix(name, "index") {
		var row []string
		_ = row[len(name)]
	}
	panic(fmt.Errorf("%s: %s", name, canaryRow))
}

func (panicking) BatchGet(context.Context, []string) ([]*store.Resource, error) { panic(canaryRow) }

// S8: rows that the database refuses, here and as copies, and faults in the middle of a call. PostgreSQL puts the whole row into the details of such an error.
func TestErrorsOfRows(t *testing.T) {
	w := newWorld(t, config{only: []key{packagesEU, packagesUS}})
	eu, us := w.places[packagesEU], w.places[packagesUS]
	c := w.client(alice, packagesEU)
	w.save(packagesEU, "sections/first", `{"n":1}`)
	has := func(name string) {
		eventually(t, time.Minute, "us has "+name, func() error {
			if status, text := w.rest(w.client(alice, packagesUS), packagesUS, "GET", "/"+name, ""); status != http.StatusOK {
				return fmt.Errorf("%d %s", status, text)
			}
			return nil
		})
	}
	has("sections/first")
	const refuse = "ALTER TABLE v1.resources ADD CONSTRAINT no_canary CHECK (body->>'note' IS DISTINCT FROM '" + canaryRow + "') NOT VALID"
	us.exec(t, refuse)
	w.save(packagesEU, "sections/poison", `{"note":"`+canaryRow+`"}`)
	w.save(packagesEU, "sections/last", `{"n":1}`)
	has("sections/last")
	eventually(t, time.Minute, "us sets the row aside", func() error {
		for _, s := range us.open.Peers() {
			if s.Quarantined > 0 {
				return nil
			}
		}
		return fmt.Errorf("peers are %s", asJSON(us.open.Peers()))
	})
	eu.exec(t, refuse)
	for _, path := range []string{"/sections/refused?allow_missing=true", "/sections/first"} {
		status, text := w.rest(c, packagesEU, "PATCH", path, `{"note":"`+canaryRow+`"}`)
		if status == http.StatusOK {
			t.Errorf("PATCH %s = %d", path, status)
		}
		clean(t, "the answer to PATCH "+path, text)
	}
	// Input that is refused may be shown in part, but not values.
	for _, body := range []string{`{"note":"` + canaryRow + `"`, `{"metadata":{"labels":{"k":"` + strings.Repeat(canaryRow, 50) + `"}}}`, `["` + canaryRow + `"]`} {
		status, text := w.rest(c, packagesEU, "PATCH", "/sections/first", body)
		if status != http.StatusBadRequest {
			t.Errorf("PATCH %.60s = %d %s", body, status, text)
		}
	}

	// A server like eu's, whose store has faults.
	var log buffer
	s, err := apiserver.New(apiserver.Config{Service: packages, Region: "eu", Version: "v1", Store: panicking{eu.open.Store()}, Owners: eu.open.Store(), Changes: eu.open.Core().Feed(),
		Replica: eu.open.Core(), Topology: w.registry, TLS: w.ca.source(t, identity(packagesEU)), TrustDomain: domain,
		Logger: slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	check(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, l) }()
	for _, path := range []string{"/sections/" + "x", "/sections/index", ":batchGet?names=sections/x", "/sections/x?min_version=no"} {
		status, text, err := request(t.Context(), c, "GET", "https://"+l.Addr().String()+"/v1"+path, nil, "")
		check(t, err)
		if status < 400 {
			t.Errorf("GET %s = %d", path, status)
		}
		clean(t, "the answer to GET "+path, text)
	}
	stop()
	check(t, <-ended)
	if text := log.String(); !strings.Contains(text, "index out of range") || !strings.Contains(text, "*fmt.wrapError") && !strings.Contains(text, "*errors.errorString") || !strings.Contains(text, "secrets_test.go") {
		t.Errorf("the log does not say what happened, and where: %s", text)
	}
	clean(t, "the log of the server with faults", log.String())
	for _, p := range w.places {
		clean(t, "the log of "+p.Region, p.log.String())
		clean(t, "the status of "+p.Region, asJSON(p.open.Status()))
		families, err := p.open.Metrics().Gather()
		check(t, err)
		clean(t, "the metrics of "+p.Region, fmt.Sprint(families))
	}
}
