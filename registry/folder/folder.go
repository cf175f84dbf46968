// Package folder reads the topology from a folder of manifests, the same YAML as in Kubernetes, and keeps the registry up to date
// while the files change.
//
// The folder's files *.yaml and *.yml (not those of folders below, nor hidden ones) hold Deployments, ServiceDescriptors and, for
// connection strings and TLS material where there is no cluster, core/v1 Secrets; several documents to a file. Each document is
// judged as an API server with our CRDs would: no unknown field, defaults filled in, structural schema and CEL rules, immutable
// fields compared with the object's previous state.
//
//	schema.go  pure: what the CRDs say about an object
//	parse.go   pure: the bytes of a file -> objects and problems
//	folder.go  the folder: read, merge, hand to the registry, watch
//
// What always holds:
//
//   - a document that is refused, or a file that cannot be read, is reported with file, document and field, and the last good state of
//     its objects stays; documents beside it are used
//   - a file that is gone takes its objects with it
//   - of two documents for one object, or of two objects for one service and region, that of the first file (by name) wins
//   - edits by atomic rename, in place, or by switching a symbolic link (as a mounted ConfigMap does) are seen, at the latest by polling
//
// A file that is written in place may be read half-written: changes are therefore taken only once the folder has been quiet for a
// moment. Rename a complete file into place to be certain.
package folder

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
	corev1 "k8s.io/api/core/v1"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/registry"
)

// maxFileBytes bounds what is read of one file; a larger one is refused.
const maxFileBytes = 8 << 20

// Config of a Source.
type Config struct {
	// Dir is the folder.
	Dir string
	// Settle is how long the folder must be quiet before a change is read; default 100 ms. A folder that is never quiet is read
	// after ten times as long.
	Settle time.Duration
	// Poll is how often the folder is read without having been notified; default 10 s.
	Poll time.Duration
	// Logger gets the problems as they come and go; default slog.Default().
	Logger *slog.Logger
}

// Source feeds a registry from a folder. It is also the registry.Secrets of the folder.
type Source struct {
	cfg      Config
	registry *registry.Registry
	schemas  schemas
	secrets  atomic.Pointer[map[id]map[string][]byte]

	// Of the goroutine in Run alone:
	files    map[string]file    // as last read, by name
	known    map[id]object      // what is in force
	found    []registry.Problem // when the folder was last read
	problems []registry.Problem // as last reported
}

// New returns a source that does nothing before Run.
func New(reg *registry.Registry, cfg Config) (*Source, error) {
	s, err := loadSchemas()
	if err != nil {
		return nil, err
	}
	cfg.Settle = cmp.Or(cfg.Settle, 100*time.Millisecond)
	cfg.Poll = cmp.Or(cfg.Poll, 10*time.Second)
	cfg.Logger = cmp.Or(cfg.Logger, slog.Default()).With("folder", cfg.Dir)
	source := &Source{cfg: cfg, registry: reg, schemas: s}
	source.secrets.Store(&map[id]map[string][]byte{})
	return source, nil
}

// Get implements registry.Secrets. An empty namespace is "default", as in a manifest.
func (s *Source) Get(_ context.Context, namespace, name string) (map[string][]byte, error) {
	data, ok := (*s.secrets.Load())[id{kindSecret, cmp.Or(namespace, defaultNamespace), name}]
	if !ok {
		return nil, fmt.Errorf("get secret %s/%s in %s: %w", namespace, name, s.cfg.Dir, registry.ErrSecretNotFound)
	}
	return maps.Clone(data), nil
}

// Run reads the folder, which makes the registry synced, and follows its changes until ctx is done; being stopped is no error. It
// fails only when the folder cannot be read at the start.
func (s *Source) Run(ctx context.Context) error {
	// Watch first, read then: a change between the two is seen twice rather than never.
	watch, err := fsnotify.NewWatcher()
	if err != nil { // the machine's limit of watches, mostly
		s.cfg.Logger.Warn("cannot watch the folder, will only poll it", "error", err)
		watch = &fsnotify.Watcher{}
	} else {
		defer watch.Close()
		_ = watch.Add(s.cfg.Dir) // a folder that is missing fails the read below
	}

	if err := s.read(); err != nil {
		return err
	}
	poll := time.NewTicker(s.cfg.Poll)
	defer poll.Stop()
	var settled <-chan time.Time
	var deadline time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-watch.Events:
			if e.Op == fsnotify.Chmod {
				continue
			}
			if settled == nil {
				deadline = time.Now().Add(10 * s.cfg.Settle)
			}
			settled = time.After(min(s.cfg.Settle, time.Until(deadline)))
			continue
		case err := <-watch.Errors:
			s.cfg.Logger.Warn("watching the folder failed, reading all of it", "error", err)
		case <-settled:
		case <-poll.C:
			if watch.Events != nil {
				_ = watch.Add(s.cfg.Dir) // the folder itself may have been replaced
			}
		}
		settled = nil
		if err := s.read(); err != nil {
			s.apply(append(slices.Clone(s.found), registry.Problem{Reason: registry.InvalidManifest, Origin: s.cfg.Dir, Message: err.Error()}))
		}
	}
}

// file is what a file gave when it was last read.
type file struct {
	sum      [sha256.Size]byte
	objects  []object // of the good documents
	kept     []object // objects of former contents that stay because of the problems
	problems []registry.Problem
}

// read brings the registry up to date with the folder. It fails, and changes nothing, when the folder cannot be listed.
func (s *Source) read() error {
	names, err := manifestNames(s.cfg.Dir)
	if err != nil {
		return fmt.Errorf("read manifests: %w", err)
	}
	files := map[string]file{}
	for _, name := range names {
		files[name] = s.readFile(name)
	}

	known := map[id]object{}
	var problems []registry.Problem
	for _, name := range names {
		problems = append(problems, files[name].problems...)
		for _, o := range files[name].objects {
			if first, ok := known[o.id]; ok {
				problems = append(problems, registry.Problem{Object: o.ref(), Reason: registry.Conflict, Origin: o.origin(),
					Message: fmt.Sprintf("%s is already declared in %s; delete one of the two", o.ref(), first.origin())})
				continue
			}
			known[o.id] = o
		}
	}
	for _, name := range names {
		for _, o := range files[name].kept {
			if _, fresh := known[o.id]; !fresh {
				known[o.id] = o
			}
		}
	}
	s.files, s.known, s.found = files, known, problems
	s.apply(problems)
	return nil
}

// manifestNames lists the manifests in a folder, in order. Hidden entries are skipped: a mounted ConfigMap keeps its generations there.
func manifestNames(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		ext := filepath.Ext(e.Name())
		if (ext == ".yaml" || ext == ".yml") && !strings.HasPrefix(e.Name(), ".") && !e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

func (s *Source) readFile(name string) file {
	was := s.files[name]
	content, err := readBounded(filepath.Join(s.cfg.Dir, name))
	if err != nil {
		return file{kept: slices.Concat(was.objects, was.kept), problems: []registry.Problem{
			{Reason: registry.InvalidManifest, Origin: name, Message: err.Error()}}}
	}
	sum := sha256.Sum256(content)
	if sum == was.sum && len(was.problems) == 0 {
		return was // with problems it is judged again: what another file says may have changed
	}
	now := file{sum: sum}
	var unreadable []id
	now.objects, unreadable, now.problems = parse(s.schemas, name, content, s.known)
	if len(now.problems) > 0 {
		now.kept = slices.Concat(was.objects, was.kept)
		for _, i := range unreadable {
			if o, ok := s.known[i]; ok { // its file may have been renamed with the edit
				now.kept = append(now.kept, o)
			}
		}
	}
	return now
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err == nil && len(content) > maxFileBytes {
		err = errors.New("the file is larger than 8 MiB; split it")
	}
	return content, err
}

// apply hands what is known to the registry, in the order of the files.
func (s *Source) apply(problems []registry.Problem) {
	snapshot := registry.Snapshot{Problems: problems}
	secrets := map[id]map[string][]byte{}
	for _, o := range slices.SortedFunc(maps.Values(s.known), object.compare) {
		switch content := o.typed.(type) {
		case *v1alpha1.Deployment:
			snapshot.Deployments = append(snapshot.Deployments, content)
		case *v1alpha1.ServiceDescriptor:
			snapshot.Services = append(snapshot.Services, content)
		case *corev1.Secret:
			secrets[o.id] = content.Data
		}
	}
	s.secrets.Store(&secrets) // first: who hears of a Deployment may ask for its secrets at once
	s.report(s.registry.Apply(snapshot))
}

// report logs the problems that are new and those that are solved.
func (s *Source) report(problems []registry.Problem) {
	for _, p := range problems {
		if !slices.Contains(s.problems, p) {
			s.cfg.Logger.Error("not in force", "problem", p.String())
		}
	}
	for _, p := range s.problems {
		if !slices.Contains(problems, p) {
			s.cfg.Logger.Info("problem solved", "problem", p.String())
		}
	}
	s.problems = problems
}
