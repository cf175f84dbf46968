package security

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
)

const (
	// victimVar makes a process of this test the API server that is attacked. Its value is a victimConfig.
	victimVar = "DBC_SECURITY_VICTIM"
	// The victim is told to live in memoryLimit, has failed if it ever needs more than memoryBound, and ends itself at memoryKill.
	memoryLimit = 256 << 20
	memoryBound = 640 << 20
	memoryKill  = 1 << 30
)

type victimConfig struct {
	DSN           string
	Cert, Key, CA []byte
	Deployments   []*v1alpha1.Deployment
	Services      []*v1alpha1.ServiceDescriptor
}

// victim is the main function of the child. It prints the address of its API, and of a page with the most bytes that its heap has had.
func victim() int {
	debug.SetMemoryLimit(memoryLimit)
	err := func() error {
		var cfg victimConfig
		if err := json.Unmarshal([]byte(os.Getenv(victimVar)), &cfg); err != nil {
			return err
		}
		reg := registry.New()
		if problems := reg.Apply(registry.Snapshot{Deployments: cfg.Deployments, Services: cfg.Services}); len(problems) > 0 {
			return fmt.Errorf("%v", problems)
		}
		source, err := pki.Static(pki.KeyPair{CertPEM: cfg.Cert, KeyPEM: cfg.Key}, cfg.CA)
		if err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
		defer stop()
		d, err := deployment.Open(ctx, deployment.Config{Key: packagesEU, Registry: reg, DSN: cfg.DSN, TLS: source, MaxConns: 6, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			return err
		}
		defer d.Close()
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		page, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		var peak atomic.Uint64
		go func() {
			sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
			for ctx.Err() == nil {
				metrics.Read(sample)
				now := sample[0].Value.Uint64()
				peak.Store(max(peak.Load(), now))
				if now > memoryKill {
					os.Exit(3)
				}
				time.Sleep(5 * time.Millisecond) // the rate of sampling, not a wait
			}
		}()
		go func() {
			_ = deployment.ServeHTTP(ctx, page, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, peak.Load()) }))
		}()
		serve, err := d.Server(l)
		if err != nil {
			return err
		}
		fmt.Println(l.Addr(), page.Addr())
		return d.Run(ctx, serve)
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// target is a running victim.
type target struct {
	w          *world
	addr, page string
	dsn        string
	ended      chan error
}

func newVictim(t *testing.T) *target {
	t.Helper()
	w := newWorld(t, config{only: []key{}})
	pair := w.ca.issue(t, nil, identity(packagesEU).String())
	dsn := pgtest.Database(t)
	text, err := json.Marshal(victimConfig{DSN: dsn, Cert: pair.CertPEM, Key: pair.KeyPEM, CA: w.ca.pem(), Deployments: w.snapshot.Deployments, Services: w.snapshot.Services})
	check(t, err)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), victimVar+"="+string(text))
	var log buffer
	cmd.Stderr = &log
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	v := &target{w: w, dsn: dsn, ended: make(chan error, 1)}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("the victim did not start: %v %s", err, log.String())
	}
	if _, err := fmt.Sscan(line, &v.addr, &v.page); err != nil {
		t.Fatal(err)
	}
	w.places[packagesEU] = &place{key: packagesEU, endpoint: "https://" + v.addr}
	go func() { v.ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGINT)
		if err := <-v.ended; err != nil {
			t.Errorf("the victim ended with %v: %s", err, log.String())
		}
	})
	return v
}

func (v *target) peak(t *testing.T) int {
	t.Helper()
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	_, text, err := request(t.Context(), &http.Client{Transport: transport}, "GET", "http://"+v.page, nil, "")
	check(t, err)
	n, err := strconv.Atoi(text)
	check(t, err)
	return n
}

// others calls as alice all the time, and returns what she saw when it is stopped.
func (v *target) others(t *testing.T) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	c := v.w.client(alice, packagesEU)
	var took []time.Duration
	var failure error
	var running sync.WaitGroup
	running.Go(func() {
		for ctx.Err() == nil {
			start := time.Now()
			status, text, err := request(ctx, c, "GET", "https://"+v.addr+"/v1/sections/s", nil, "")
			if ctx.Err() != nil {
				return
			}
			took = append(took, time.Since(start))
			if err != nil || status != http.StatusOK {
				failure = fmt.Errorf("%d %.300s %w", status, text, err)
			}
		}
	})
	return func() {
		t.Helper()
		cancel()
		running.Wait()
		slices.Sort(took)
		if failure != nil || len(took) == 0 {
			t.Errorf("of %d calls of others one failed: %v", len(took), failure)
			return
		}
		p99 := took[len(took)*99/100]
		t.Logf("others: %d calls, p50 %s, p99 %s, longest %s", len(took), took[len(took)/2], p99, took[len(took)-1])
		if p99 > 5*time.Second {
			t.Errorf("others waited %s", p99)
		}
	}
}

var mallory = pki.Identity{TrustDomain: domain, User: "mallory"}

// S9: requests that would fill the memory, by somebody with a valid certificate. Each is refused in words that say what to change, the heap stays bounded, and others
// are served all the time.
func TestLimits(t *testing.T) {
	v := newVictim(t)
	w, base := v.w, "https://"+v.addr
	w.save(packagesEU, "sections/s", `{"n":1}`)
	const rpc = "/dbcontroller.v1.Resources/"
	zeros := func(n int64) []byte {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		_, err := io.Copy(z, io.LimitReader(repeat(0), n))
		check(t, err)
		check(t, z.Close())
		return b.Bytes()
	}
	empties := func(field protowire.Number, n int) []byte {
		return bytes.Repeat(protowire.AppendBytes(protowire.AppendTag(nil, field, protowire.BytesType), nil), n)
	}
	nested := func(field protowire.Number, inner []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, field, protowire.BytesType), inner)
	}
	list := func(n int, element string) string { return strings.Repeat(element+",", n-1) + element }
	bomb := zeros(1 << 28)
	attacks := []struct {
		situation, method, path, contentType string
		body                                 func() io.Reader
		header                               []string
		status                               []int
		says                                 string
	}{
		{"a row of 100 MB", "PATCH", "/v1/sections/x?allow_missing=true", "application/json",
			func() io.Reader {
				return io.MultiReader(strings.NewReader(`{"x":"`), io.LimitReader(repeat('x'), 100<<20), strings.NewReader(`"}`))
			}, nil, []int{400, 429}, "larger than"},
		{"a row of 100 MB by RPC", "POST", rpc + "Update", "application/proto", func() io.Reader { return io.LimitReader(repeat('x'), 100<<20) }, nil, []int{429}, "larger than"},
		{"a row beyond its type's limit", "PATCH", "/v1/sections/x?allow_missing=true", "application/json",
			func() io.Reader { return strings.NewReader(`{"x":"` + strings.Repeat("x", 2<<20) + `"}`) }, nil, []int{400}, "bytes"},
		{"JSON nested 10,000 deep, of 10 MB", "PATCH", "/v1/sections/x?allow_missing=true", "application/json",
			func() io.Reader {
				return strings.NewReader(strings.Repeat(`{"a":[`, 10_000) + strings.Repeat(" ", 10<<20))
			}, nil, []int{400, 429}, "larger than"},
		{"JSON nested 10,000 deep", "PATCH", "/v1/sections/x?allow_missing=true", "application/json",
			func() io.Reader {
				return strings.NewReader(`{"x":` + strings.Repeat("[", 10_000) + strings.Repeat("]", 10_000) + `}`)
			}, nil, []int{400}, "nested deeper"},
		{"JSON nested 10,000 deep in a message", "POST", rpc + "Create", "application/json",
			func() io.Reader {
				return strings.NewReader(`{"unknown":` + strings.Repeat("[", 10_001) + strings.Repeat("]", 10_001) + `}`)
			}, nil, []int{400}, ""},
		{"protobuf nested 1,000,000 deep", "POST", rpc + "BatchWrite", "application/proto", func() io.Reader { return bytes.NewReader(bytes.Repeat([]byte{0x0b}, 1_000_000)) }, nil, []int{400}, ""},
		{"256 MB in 256 KB", "POST", rpc + "Update", "application/proto", func() io.Reader { return bytes.NewReader(bomb) }, []string{"Content-Encoding", "gzip"}, []int{429}, "larger than"},
		{"256 MB in 256 KB by REST", "PATCH", "/v1/sections/x?allow_missing=true", "application/json", func() io.Reader { return bytes.NewReader(bomb) }, []string{"Content-Encoding", "gzip"}, []int{400}, "UTF-8"},
		{"2,000,000 empty writes", "POST", rpc + "BatchWrite", "application/proto", func() io.Reader { return bytes.NewReader(empties(1, 2_000_000)) }, nil, []int{400}, "fields and elements"},
		{"1,000,000 labels", "POST", rpc + "Create", "application/proto",
			func() io.Reader { return bytes.NewReader(nested(2, nested(2, empties(1, 1_000_000)))) }, nil, []int{400}, ""},
		{"1,300,000 empty writes in JSON", "POST", rpc + "BatchWrite", "application/json", func() io.Reader { return strings.NewReader(`{"writes":[` + list(1_300_000, "{}") + `]}`) }, nil, []int{400}, "fields and elements"},
		{"1,300,000 empty writes by REST", "POST", "/v1:batchWrite", "application/json", func() io.Reader { return strings.NewReader(`{"writes":[` + list(1_300_000, "{}") + `]}`) }, nil, []int{400}, "fields and elements"},
		{"90,000 empty writes by REST", "POST", "/v1:batchWrite", "application/json", func() io.Reader { return strings.NewReader(`{"writes":[` + list(90_000, "{}") + `]}`) }, nil, []int{400}, "1 to 1000"},
		{"500,000 fields of one body", "PATCH", "/v1/sections/x?allow_missing=true", "application/json",
			func() io.Reader { return strings.NewReader(`{` + list(500_000, `"":0`) + `}`) }, nil, []int{400}, ""},
		{"a filter of 1 MB", "POST", rpc + "List", "application/json", func() io.Reader {
			return strings.NewReader(`{"collection":"sections","filter":"` + list(1<<16, "n = 1 OR n = 2") + `"}`)
		}, nil, []int{400}, "filter"},
		{"a filter nested 5,000 deep", "POST", rpc + "List", "application/json",
			func() io.Reader {
				return strings.NewReader(`{"collection":"sections","filter":"` + strings.Repeat("(", 5000) + "n=1" + strings.Repeat(")", 5000) + `"}`)
			}, nil, []int{400}, "filter"},
		{"100,000 names", "POST", rpc + "BatchGet", "application/json", func() io.Reader { return strings.NewReader(`{"names":[` + list(100_000, `"sections/s"`) + `]}`) }, nil, []int{400}, "1 to 1000"},
		{"a header of 1 MB", "GET", "/v1/sections/s", "", func() io.Reader { return http.NoBody }, []string{"X-Large", strings.Repeat("x", 1<<20)}, nil, ""},
		{"a path of 1 MB", "GET", "/v1/sections/" + strings.Repeat("x", 1<<20), "", func() io.Reader { return http.NoBody }, nil, nil, ""},
	}
	idle := v.peak(t)
	stop := v.others(t)
	client := w.client(mallory, packagesEU)
	for _, a := range attacks {
		t.Run(a.situation, func(t *testing.T) {
			var all sync.WaitGroup
			for range 4 { // at once
				all.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
					defer cancel()
					req, err := http.NewRequestWithContext(ctx, a.method, base+a.path, a.body())
					if err != nil {
						t.Error(err)
						return
					}
					if a.contentType != "" {
						req.Header.Set("Content-Type", a.contentType)
					}
					for i := 0; i < len(a.header); i += 2 {
						req.Header.Set(a.header[i], a.header[i+1])
					}
					res, err := client.Do(req)
					if err != nil { // the server closed the stream or the connection
						if a.status != nil && !strings.Contains(a.situation, "100 MB") {
							t.Error(err)
						}
						return
					}
					defer res.Body.Close()
					text, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
					if err != nil {
						t.Error(err)
					}
					if res.StatusCode < 400 || a.status != nil && !slices.Contains(a.status, res.StatusCode) || !strings.Contains(string(text), a.says) {
						if res.StatusCode != http.StatusTooManyRequests || !strings.Contains(string(text), "in flight") {
							t.Errorf("answered %d %.500s, want %v with %q", res.StatusCode, text, a.status, a.says)
						}
					}
				})
			}
			all.Wait()
		})
	}
	stop()
	peak := v.peak(t)
	t.Logf("heap: %d MiB before, at most %d MiB", idle>>20, peak>>20)
	if peak > memoryBound {
		t.Errorf("the heap had %d MiB", peak>>20)
	}
}

// S9: very many small calls, and many connections, by one caller; and many that stay open and say nothing.
func TestFloods(t *testing.T) {
	t.Parallel()
	v := newVictim(t)
	w := v.w
	w.save(packagesEU, "sections/s", `{"n":1}`)
	stop := v.others(t)

	t.Run("slow callers", func(t *testing.T) {
		// Each keeps a connection, at another point of its beginning.
		good := insecure(certificate(t, w.ca, mallory))
		good.NextProtos = []string{"http/1.1"}
		var conns []net.Conn
		for i := range 300 {
			conn, err := net.Dial("tcp", v.addr)
			check(t, err)
			defer conn.Close()
			switch i % 3 {
			case 0: // says nothing
			case 1: // half of a hello
				_, err = conn.Write([]byte{0x16, 0x03, 0x01, 0x02, 0x00})
			case 2: // half of a request
				secure := tls.Client(conn, good)
				if err = secure.Handshake(); err == nil {
					_, err = fmt.Fprintf(secure, "POST /v1/sections HTTP/1.1\r\nHost: eu\r\nX-%d: ", i)
				}
				conn = secure
			}
			check(t, err)
			conns = append(conns, conn)
		}
		// The server gives all of them up.
		deadline := time.Now().Add(20 * time.Second)
		for i, conn := range conns {
			check(t, conn.SetReadDeadline(deadline))
			if _, err := io.Copy(io.Discard, conn); err != nil && os.IsTimeout(err) {
				t.Fatalf("connection %d is open after 20 s", i)
			}
		}
	})
	t.Run("10,000 small calls", func(t *testing.T) {
		client := w.client(mallory, packagesEU)
		var all sync.WaitGroup
		var served, refused, other atomic.Int64
		for range 200 {
			all.Go(func() {
				for range 50 {
					status, _, err := request(t.Context(), client, "GET", "https://"+v.addr+"/v1/sections/s", nil, "")
					switch {
					case err == nil && status == http.StatusOK:
						served.Add(1)
					case err == nil && status == http.StatusTooManyRequests:
						refused.Add(1)
					default:
						other.Add(1)
					}
				}
			})
		}
		all.Wait()
		t.Logf("%d served, %d refused, %d failed", served.Load(), refused.Load(), other.Load())
		if other.Load() > 0 || served.Load() == 0 {
			t.Errorf("%d calls failed, %d were served", other.Load(), served.Load())
		}
	})
	t.Run("bodies that never end", func(t *testing.T) {
		// More than the share of one caller, at 4 MiB each, were they not counted.
		client := w.client(mallory, packagesEU)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var all sync.WaitGroup
		var refused atomic.Int64
		for range 64 {
			all.Go(func() {
				body := io.MultiReader(io.LimitReader(repeat(' '), 4<<20-1), until(ctx))
				req, err := http.NewRequestWithContext(ctx, "POST", "https://"+v.addr+"/v1:batchWrite", body)
				if err != nil {
					t.Error(err)
					return
				}
				req.Header.Set("Content-Type", "application/json")
				res, err := client.Do(req)
				if err != nil {
					return
				}
				defer res.Body.Close()
				if text, _ := io.ReadAll(res.Body); res.StatusCode == http.StatusTooManyRequests && strings.Contains(string(text), "in flight") {
					refused.Add(1)
				}
			})
		}
		eventually(t, 25*time.Second, "those beyond the share are refused", func() error {
			if n := refused.Load(); n < 32 {
				return fmt.Errorf("%d are", n)
			}
			return nil
		})
		cancel()
		all.Wait()
		// What was taken is given back.
		eventually(t, 10*time.Second, "mallory is served again", func() error {
			status, text, err := request(t.Context(), client, "GET", "https://"+v.addr+"/v1/sections/s", nil, "")
			if err == nil && status != http.StatusOK {
				err = fmt.Errorf("%d %s", status, text)
			}
			return err
		})
	})
	stop()
	if peak := v.peak(t); peak > memoryBound {
		t.Errorf("the heap had %d MiB", peak>>20)
	} else {
		t.Logf("heap: at most %d MiB", peak>>20)
	}
}

// S9: answers are bounded as requests are: a page, or a batch, of the largest rows.
func TestAnswersAreBounded(t *testing.T) {
	v := newVictim(t)
	w := v.w
	const rows = 70
	body := strings.Repeat("x", 1<<20-100)
	var names []string
	for i := range rows {
		names = append(names, fmt.Sprintf("sections/s%03d", i))
	}
	w.save(packagesEU, names[0], `{"x":"`+body+`"}`)
	(&place{dsn: v.dsn}).exec(t, `INSERT INTO v1.resources SELECT (jsonb_populate_record(r, jsonb_build_object('name', n, 'uuid', gen_random_uuid()))).*
		FROM v1.resources r, unnest($1::text[]) n`, names[1:])
	c := w.client(mallory, packagesEU)
	status, text := w.rest(c, packagesEU, "GET", ":batchGet?names="+strings.Join(names, "&names="), "")
	if status != http.StatusBadRequest || !strings.Contains(text, "ask for fewer") {
		t.Errorf("a batch of %d MiB = %d %.300s", rows, status, text)
	}
	seen, token, pages := 0, "", 0
	for {
		status, text := w.rest(c, packagesEU, "GET", "/sections?page_size=1000&page_token="+token, "")
		if status != http.StatusOK || len(text) > 24<<20 {
			t.Fatalf("a page = %d, %d bytes", status, len(text))
		}
		var page struct {
			Resources     []struct{ Name string }
			NextPageToken string
		}
		check(t, json.Unmarshal([]byte(text), &page))
		for _, r := range page.Resources {
			if r.Name != names[seen] {
				t.Fatalf("resource %d is %s, want %s", seen, r.Name, names[seen])
			}
			seen++
		}
		pages++
		if token = page.NextPageToken; token == "" {
			break
		}
	}
	if seen != rows || pages < rows/20 {
		t.Errorf("%d resources in %d pages", seen, pages)
	}
	if peak := v.peak(t); peak > memoryBound {
		t.Errorf("the heap had %d MiB", peak>>20)
	}
}

func certificate(t *testing.T, ca *authority, id pki.Identity) tls.Certificate {
	t.Helper()
	pair := ca.issue(t, nil, id.String())
	c, err := tls.X509KeyPair(pair.CertPEM, pair.KeyPEM)
	check(t, err)
	return c
}

// repeat is the same byte for ever.
type repeat byte

func (r repeat) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(r)
	}
	return len(p), nil
}

// until says nothing before ctx is done.
func until(ctx context.Context) io.Reader { return silent{ctx} }

type silent struct{ ctx context.Context }

func (s silent) Read([]byte) (int, error) {
	<-s.ctx.Done()
	return 0, s.ctx.Err()
}
