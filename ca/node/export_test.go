package node

// BeforeWrite puts f before each write to the log of a node that is not yet opened.
func (c *Config) BeforeWrite(f func() error) { c.beforeWrite = f }
