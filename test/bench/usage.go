package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/dbcontroller/db-controller/internal/pgserver"
)

// tick is the unit of the times in /proc/PID/stat: USER_HZ, the same on every Linux.
const tick = 10 * time.Millisecond

// stat returns the fields of /proc/PID/stat from the state on, so that field 3 of proc(5) has index 0.
func stat(pid int) []string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil // it has ended
	}
	return strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:])) // the name before may hold blanks
}

// ticks adds up some fields of stat.
func ticks(fields []string, indexes ...int) (sum time.Duration) {
	for _, i := range indexes {
		if i < len(fields) {
			n, _ := strconv.ParseInt(fields[i], 10, 64)
			sum += time.Duration(n) * tick
		}
	}
	return sum
}

const (
	utime, stime   = 11, 12
	cutime, cstime = 13, 14 // of children that have ended and were waited for
)

// serverCPU is what a cluster has used so far: the postmaster, its children that live, and those that have ended.
func serverCPU(s *pgserver.Server) (time.Duration, error) {
	text, err := os.ReadFile(filepath.Join(s.Dir(), "postmaster.pid"))
	if err != nil {
		return 0, fmt.Errorf("find the postmaster: %w", err)
	}
	line, _, _ := strings.Cut(string(text), "\n")
	pid, err := strconv.Atoi(line)
	if err != nil {
		return 0, fmt.Errorf("find the postmaster: %w", err)
	}
	sum := ticks(stat(pid), utime, stime, cutime, cstime)
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, list := range lists {
		children, _ := os.ReadFile(list)
		for _, child := range strings.Fields(string(children)) {
			if n, err := strconv.Atoi(child); err == nil {
				sum += ticks(stat(n), utime, stime)
			}
		}
	}
	return sum, nil
}

func processCPU(pid int) time.Duration { return ticks(stat(pid), utime, stime) }

// ownCPU is what this process has used so far.
func ownCPU() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// resident returns the resident memory of a process, now and at most, in MiB.
func resident(pid int) (now, peak float64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		kib, _ := strconv.ParseFloat(fields[1], 64)
		switch fields[0] {
		case "VmRSS:":
			now = kib / 1024
		case "VmHWM:":
			peak = kib / 1024
		}
	}
	return now, peak, nil
}

// load describes how busy the machine is with other things.
func load() string {
	text, _ := os.ReadFile("/proc/loadavg")
	averages, _, _ := strings.Cut(string(text), "/")
	fields := strings.Fields(averages)
	if len(fields) < 3 {
		return "load unknown"
	}
	return "load " + strings.Join(fields[:3], " ")
}

// usage is CPU time: of the two clusters, and of our processes at either end.
type usage struct{ sourceServer, destServer, sourceNode, destNode time.Duration }

func (u usage) minus(o usage) usage {
	return usage{u.sourceServer - o.sourceServer, u.destServer - o.destServer, u.sourceNode - o.sourceNode, u.destNode - o.destNode}
}

// per returns microseconds a row, for people.
func (u usage) per(rows int) string {
	us := func(d time.Duration) float64 { return float64(d.Microseconds()) / float64(max(1, rows)) }
	return fmt.Sprintf("src %5.1f  dst %5.1f  ctl %4.1f+%.1f us/row", us(u.sourceServer), us(u.destServer), us(u.sourceNode), us(u.destNode))
}
