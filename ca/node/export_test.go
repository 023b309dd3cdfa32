package node

import "time"

// BeforeWrite puts f before each write to the log of a node that is not yet opened.
func (c *Config) BeforeWrite(f func() error) { c.beforeWrite = f }

// PretendLevel has a node say that its software is older than it is.
func (c *Config) PretendLevel(level uint32) { c.pretendLevel = level }

// CompareEvery is after how many log entries states are compared.
func (c *Config) CompareEvery(entries uint64) { c.compareEvery = entries }

// ClockError is by how much a node's clock is ahead, asked each time it is read.
func (c *Config) ClockError(f func() time.Duration) { c.clockError = f }
