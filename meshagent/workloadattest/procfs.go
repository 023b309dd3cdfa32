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

// status is what /proc/PID/status says of a process's rights.
type status struct {
	uid, gid uint32   // effective
	groups   []uint32 // supplementary
}

// parseStatus reads /proc/PID/status, proc_pid_status(5): "Uid:\treal\teffective\t
// saved\tfs" and "Groups:\t1 2". The lines before them are the kernel's; a command's
// name there has its line breaks escaped.
func parseStatus(text []byte) (s status, err error) {
	ids := func(name string) ([]uint32, error) {
		for line := range bytes.Lines(text) {
			rest, ok := bytes.CutPrefix(line, []byte(name))
			if !ok {
				continue
			}
			var list []uint32
			for _, field := range bytes.Fields(rest) {
				id, err := strconv.ParseUint(string(field), 10, 32)
				if err != nil {
					return nil, fmt.Errorf("/proc/PID/status: %s %w", name, err)
				}
				list = append(list, uint32(id))
			}
			return list, nil
		}
		return nil, fmt.Errorf("/proc/PID/status has no %s", name)
	}
	effective := func(name string) (uint32, error) {
		list, err := ids(name)
		if err == nil && len(list) != 4 {
			err = fmt.Errorf("/proc/PID/status: %s has %d values, not 4", name, len(list))
		}
		if err != nil {
			return 0, err
		}
		return list[1], nil
	}
	if s.uid, err = effective("Uid:"); err != nil {
		return status{}, err
	}
	if s.gid, err = effective("Gid:"); err != nil {
		return status{}, err
	}
	if s.groups, err = ids("Groups:"); err != nil {
		return status{}, err
	}
	return s, nil
}

// parseParent takes field 4 (the parent's pid) out of /proc/PID/stat.
func parseParent(stat []byte) (int, error) {
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return 0, errors.New("/proc/PID/stat has no command name")
	}
	fields := bytes.Fields(stat[end+1:])
	if len(fields) < 2 {
		return 0, fmt.Errorf("/proc/PID/stat has only %d fields", len(fields)+2)
	}
	parent, err := strconv.ParseInt(string(fields[1]), 10, 32)
	if err != nil || parent < 0 {
		return 0, fmt.Errorf("/proc/PID/stat: parent %.20q", fields[1])
	}
	return int(parent), nil
}
