package pgserver

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const tempPrefix = "dbc-pg-"

// lockName is a file that the owner of a temporary folder keeps locked. The
// kernel drops the lock when the owner dies.
const lockName = "lock"

// tempParent is where clusters without a folder of their own live: $DBC_POSTGRES_TMP, for
// example a file system in memory, or the system's temporary folder.
func tempParent() string { return cmp.Or(os.Getenv("DBC_POSTGRES_TMP"), os.TempDir()) }

// tempDir is a folder in tempParent whose path is short enough for a socket.
type tempDir struct {
	path string
	lock *os.File
}

func newTempDir() (tempDir, error) {
	parent := tempParent()
	if len(parent) > 60 {
		parent = "/tmp" // a socket's path holds 107 bytes at most
	}
	path, err := os.MkdirTemp(parent, tempPrefix)
	if err != nil {
		return tempDir{}, fmt.Errorf("make a temporary folder: %w", err)
	}
	// The lock gets its name only once it is held, so removeAbandoned never
	// takes a new folder for an abandoned one.
	unnamed := filepath.Join(path, lockName+".new")
	lock, err := os.Create(unnamed)
	if err == nil {
		err = errors.Join(
			unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB),
			os.Rename(unnamed, filepath.Join(path, lockName)),
		)
	}
	if err != nil {
		return tempDir{}, errors.Join(fmt.Errorf("lock %s: %w", path, err), os.RemoveAll(path))
	}
	return tempDir{path: path, lock: lock}, nil
}

func (d tempDir) remove() error {
	return errors.Join(d.lock.Close(), os.RemoveAll(d.path))
}

// removeAbandoned removes the folders of processes that were killed. Failures
// are ignored: another user's folders are not ours to remove.
func removeAbandoned(parent string) {
	locks, _ := filepath.Glob(filepath.Join(parent, tempPrefix+"*", lockName))
	for _, path := range locks {
		lock, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
		if err != nil {
			continue
		}
		if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			dir := filepath.Dir(path)
			releaseMemory(filepath.Join(dir, "data"))
			_ = os.RemoveAll(dir)
		}
		lock.Close()
	}
}

// releaseMemory frees the System V segment that a postmaster killed with
// SIGKILL leaves behind. postmaster.pid names it in its seventh line, and a
// postmaster that ended by itself has removed that file.
func releaseMemory(data string) {
	text, err := os.ReadFile(filepath.Join(data, "postmaster.pid"))
	if err != nil {
		return
	}
	lines := strings.Split(string(text), "\n")
	if len(lines) < 7 {
		return
	}
	if fields := strings.Fields(lines[6]); len(fields) == 2 {
		if id, err := strconv.Atoi(fields[1]); err == nil {
			_, _ = unix.SysvShmCtl(id, unix.IPC_RMID, nil) // already gone is as good
		}
	}
}
