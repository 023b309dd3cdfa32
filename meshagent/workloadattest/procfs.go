package workloadattest

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
)

// parseStartTime takes field 22 (start time, in clock ticks since boot) out of
// /proc/PID/stat, proc_pid_stat(5). Field 2 is the command's name in parentheses
// and may itself hold spaces, parentheses and line breaks: what follows the last
// ")" counts.
func parseStartTime(stat []byte) (uint64, error) {
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return 0, errors.New("/proc/PID/stat has no command name")
	}
	const field = 22 - 3 // counted from field 3, the first after the name
	fields := bytes.Fields(stat[end+1:])
	if len(fields) <= field {
		return 0, fmt.Errorf("/proc/PID/stat has only %d fields", len(fields)+2)
	}
	start, err := strconv.ParseUint(string(fields[field]), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("/proc/PID/stat: start time: %w", err)
	}
	return start, nil
}

// parseStatus takes the effective user and group out of /proc/PID/status,
// proc_pid_status(5): "Uid:\treal\teffective\tsaved\tfs". The lines before them
// are the kernel's; a command's name there has its line breaks escaped.
func parseStatus(status []byte) (uid, gid uint32, err error) {
	effective := func(name string) (uint32, error) {
		for line := range bytes.Lines(status) {
			rest, ok := bytes.CutPrefix(line, []byte(name))
			if !ok {
				continue
			}
			fields := bytes.Fields(rest)
			if len(fields) != 4 {
				return 0, fmt.Errorf("/proc/PID/status: %s has %d values, not 4", name, len(fields))
			}
			id, err := strconv.ParseUint(string(fields[1]), 10, 32)
			if err != nil {
				return 0, fmt.Errorf("/proc/PID/status: %s %w", name, err)
			}
			return uint32(id), nil
		}
		return 0, fmt.Errorf("/proc/PID/status has no %s", name)
	}
	if uid, err = effective("Uid:"); err != nil {
		return 0, 0, err
	}
	if gid, err = effective("Gid:"); err != nil {
		return 0, 0, err
	}
	return uid, gid, nil
}
